"""Runs that tests launch on the virtual cluster as users do, from a folder of their own; and what faults cost them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from headway.launch import ledger
from headway.launch.slurm import jobs
from headway.pretrain.records.metrics import read_metrics
from headway.pretrain.records.records import read_events
from headway.tests.launch.slurm.cluster import Cluster, poll

HEADWAY = [sys.executable, "-P", "-c", "from headway.launch.cli import main; main()"]
PACE = Path(__file__).with_name("pace")
STEPS, EVERY = 60, 10
"""Steps of a run, and between its checkpoints."""

# gpt/tiny, smaller: its optimizer and its schedule, with dropout, on few documents, in fp64.
SMALL = """\
model: {{layers: 2, hidden: 32, heads: 2, dropout: 0.1}}
data: {{seq_len: 32, heldout: 0.2, tokenizer: {{kind: bytes, vocab: 4096}}, sources: ['{corpus}']}}
train: {{steps: {steps}, global_batch: 4, eval_every: 0, compile: false}}
precision: fp64
checkpoint: {{every: {every}}}
tracking: {{wandb: off, prompt: "the cat"}}
"""


class Cost(NamedTuple):
    """What a fault cost a run: steps that were computed again, seconds until Slurm had started the run again, and
    until it was beyond the step that it had reached."""

    fault: str
    steps: int
    started: float
    recovered: float


COSTS: list[Cost] = []


def summary() -> list[str]:
    """A line for each fault."""
    return [
        f"{cost.fault:48}  {cost.steps:3} steps computed again, running again after {cost.started:5.1f} s, "
        f"beyond the step reached after {cost.recovered:5.1f} s"
        for cost in COSTS
    ]


class Run:
    """A run's folder, and its jobs on the cluster."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder

    @property
    def jobs(self) -> list[str]:
        return jobs.submitted(self.folder)

    @property
    def job(self) -> str:
        """The first one."""
        return self.jobs[0]

    def log(self) -> str:
        """What its jobs have printed."""
        logs = sorted((self.folder / "slurm").glob("*.log"), key=lambda path: path.stat().st_mtime)
        return "".join(f"-- {path.name}\n{path.read_text(errors='replace')}" for path in logs)

    def starts(self) -> int:
        """How often one of its jobs has started."""
        return sum(line.startswith("== ") and ", start " in line for line in self.log().splitlines())

    def begun(self) -> list[int]:
        """After which step each of its starts went on, 0 for one that began."""
        return [event["step"] for event in read_events(self.folder) if event["kind"] in ("start", "resume")]

    def step(self) -> int:
        """The newest step that is recorded."""
        rows = read_metrics(self.folder) if (self.folder / "metrics.jsonl").exists() else []
        return rows[-1]["step"] if rows else 0

    def wait_for_step(self, step: int, timeout: float = 120) -> None:
        poll(lambda: self.step() >= step, timeout, lambda: f"at step {self.step()}\n{self.log()}")

    def wait_until_done(self, timeout: float = 180) -> None:
        """Until its last job has completed."""
        self.cluster.wait(self.jobs[-1], {"COMPLETED"}, timeout)

    def losses(self) -> list[float]:
        """Of all steps, each of which is there once."""
        rows = read_metrics(self.folder)
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        return [row["loss"] for row in rows]

    def prove(self, straight: Run) -> None:
        """Assert that it drew the losses of a run without faults, bit by bit, used every sample once an epoch, and has
        whole checkpoints."""
        assert self.losses() == straight.losses(), self.log()
        ledger.show(str(self.folder), open_data=True)
        command = [*HEADWAY, "checkpoint", "verify", str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    def faults(self) -> list[dict[str, Any]]:
        """What its jobs have noted."""
        return [line for line in jobs.notes(self.folder) if line["kind"] == "fault"]

    def recover(self, fault: str, start: int, timeout: float = 120) -> Cost:
        """After a fault: wait until start number `start` has come further than the run was, and note the cost,
        which is returned."""
        begin, reached = time.monotonic(), self.step()

        def started() -> bool:
            nonlocal reached
            reached = max(reached, self.step())  # ranks go on until the fault ends them
            return self.starts() >= start

        def beyond() -> bool:
            return len(self.begun()) >= start and (self.step() > reached or self.step() == STEPS)

        poll(started, timeout, lambda: f"{fault}: not started again\n{self.log()}")
        running = time.monotonic() - begin
        poll(beyond, timeout, lambda: f"{fault}: at step {self.step()}, was at {reached}\n{self.log()}")
        COSTS.append(Cost(fault, reached - self.begun()[-1], running, time.monotonic() - begin))
        return COSTS[-1]


class Desk:
    """Where a user sits: a folder with a small recipe, on a machine that has Slurm's commands."""

    def __init__(self, cluster: Cluster, folder: Path, corpus: Path, pace: float = 0.1) -> None:
        self.cluster, self.folder = cluster, folder
        text = SMALL.format(corpus=corpus, steps=STEPS, every=EVERY)
        (folder / "small.yaml").write_text(text)
        self.environment = cluster.environment | {"HEADWAY_TEST_PACE": str(pace)}
        path = [str(PACE), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment["PYTHONPATH"] = os.pathsep.join(path)

    def headway(self, *arguments: str, code: int = 0) -> str:
        """What `headway ARGUMENTS` prints; asserts its exit code."""
        done = subprocess.run(
            [*HEADWAY, *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def launch(self, *options: str, name: str = "run", nodes: int = 2, partition: str = "main") -> Run:
        """`headway launch slurm` of the small recipe, a rank a node."""
        self.headway(
            *("launch", "slurm", "gpt/tiny", "small.yaml", "--set", f"run.name={name}"),
            *(f"--nodes={nodes}", "--tasks-per-node=1", f"--partition={partition}", "--time=30", *options),
        )
        return Run(self.cluster, self.folder / "runs" / name)


MakeDesk = Callable[..., Desk]
