"""The three engines on the same job: step time, peak memory and start-up, at one process and at two, interleaved.

    python tests/benchmarks/bench_engines.py [--rounds 12] [--processes 1 2] [--layouts shard tensor] [--precision fp32]

Every engine has processes of its own, which wait at a pipe while another one steps: the engines take turns, round by
round, so that a drift of the machine's clock meets all of them. Start-up is from the start of the processes to the end
of their first step, import and all; memory is the peak of a process' resident set. Ratios are to the native engine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

ENGINES = ("native", "deepspeed", "megatron")
LAYOUTS: dict[str, dict[str, Any]] = {
    "shard": {"shard": -1},
    "replicate": {"replicate": -1, "shard": 1},
    "tensor": {"tensor": -1, "shard": 1},
}
CORES = 2


# -- one process of an engine ----------------------------------------------------------------------------------


def work(engine: str, layout: str, precision: str, rank: int, world: int) -> None:
    """Answer every line of the standard input with a step's seconds, loss and peak memory."""
    import torch
    from bench_engine import SMALL, batch_of, job_of

    from headway.parallel import mesh
    from headway.parallel.engines.build import build_engine
    from headway.pretrain.models.inputs import Inputs
    from headway.pretrain.objectives import build_objective

    torch.set_num_threads(CORES // world)
    job = job_of(SMALL, precision)
    parallel = type(job.parallel).model_validate(LAYOUTS[layout] | {"engine": engine})
    job = job.model_copy(update={"parallel": parallel})
    here = mesh.start(job, mesh.lay_out(parallel, world), rank, world, rank, torch.device("cpu"), "gloo")
    objective = build_objective(job, Inputs(SMALL.vocab, SMALL.length), device="meta")
    running = build_engine(job, objective, here, precision=precision, compiled=False)
    share = SMALL.rows // here.layout.data
    first = here.data_rank * share
    mine = {name: value[first : first + share] for name, value in batch_of(SMALL).items()}
    number = 0
    say({"loss": running.train_step(mine, number).loss})
    for _ in sys.stdin:
        number += 1
        start = time.perf_counter()
        loss = running.train_step(mine, number).loss
        say({"seconds": time.perf_counter() - start, "loss": loss, "gib": peak()})
    mesh.stop()


def say(value: dict[str, float]) -> None:
    print(f"answer {json.dumps(value)}", flush=True)


def peak() -> float:
    """Peak of this process' resident set, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# -- all of them -----------------------------------------------------------------------------------------------


class Team:
    """The processes of one engine."""

    def __init__(self, engine: str, layout: str, precision: str, world: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        begin = time.perf_counter()
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--work", engine, layout, precision, str(rank), str(world)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=env,
            )
            for rank in range(world)
        ]
        self.first = self.answers()[0]["loss"]
        self.startup = time.perf_counter() - begin
        self.steps: list[dict[str, float]] = []

    def answers(self) -> list[dict[str, float]]:
        return [_answer(process) for process in self.processes]

    def step(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        found = self.answers()
        slowest, largest = max(f["seconds"] for f in found), max(f["gib"] for f in found)
        self.steps.append({"seconds": slowest, "gib": largest, "loss": found[0]["loss"]})

    def stop(self) -> None:
        for process in self.processes:
            process.communicate()


def _answer(process: subprocess.Popen[str]) -> dict[str, float]:
    assert process.stdout is not None
    for line in process.stdout:  # libraries print too
        if line.startswith("answer "):
            found: dict[str, float] = json.loads(line.removeprefix("answer "))
            return found
    raise RuntimeError(f"{process.args} ended with code {process.wait()}")


def race(layout: str, precision: str, world: int, rounds: int) -> None:
    """Print a line for each engine."""
    teams = {engine: Team(engine, layout, precision, world) for engine in ENGINES}
    for number in range(rounds + 2):
        order = ENGINES[number % 3 :] + ENGINES[: number % 3]
        for engine in order:
            teams[engine].step()
    losses = {engine: [team.first, *(step["loss"] for step in team.steps)] for engine, team in teams.items()}
    tolerance = 1e-5 if precision == "fp32" else 1e-2
    for mine, native in zip(zip(*losses.values(), strict=True), losses["native"], strict=True):
        assert all(abs(loss / native - 1) < tolerance for loss in mine), f"not the same curve: {losses}"
    natively = [step["seconds"] for step in teams["native"].steps[2:]]
    for engine, team in teams.items():
        seconds = [step["seconds"] for step in team.steps[2:]]
        ratio = statistics.median(a / b for a, b in zip(seconds, natively, strict=True))
        print(
            f"  {world} x {layout:10} {engine:10} step {statistics.median(seconds) * 1e3:7.1f} ms "
            f"({ratio:.2f} of native), peak {team.steps[-1]['gib']:.2f} GiB a process, start {team.startup:.1f} s",
            flush=True,
        )
        team.stop()


def main() -> None:
    if "--work" in sys.argv:
        engine, layout, precision, rank, world = sys.argv[sys.argv.index("--work") + 1 :]
        return work(engine, layout, precision, int(rank), int(world))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12, help="measured steps of each engine")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    args = parser.parse_args()
    print(f"a GPT of 4 x 256, 2,048 tokens a step, {args.precision}, eager, {CORES} threads in all")
    for world in args.processes:
        for layout in args.layouts[:1] if world == 1 else args.layouts:
            race(layout, args.precision, world, args.rounds)


if __name__ == "__main__":
    main()
