"""`headway launch status`, `logs` and `cancel` of a run."""

from __future__ import annotations

import os
import time
from pathlib import Path

from rich.table import Table

from headway.launch.console import console
from headway.launch.slurm import client, jobs
from headway.launch.slurm.after import newest_step
from headway.launch.slurm.client import JobState
from headway.pretrain.errors import JobError
from headway.pretrain.recipe import load_job
from headway.pretrain.records.metrics import read_metrics
from headway.pretrain.records.progress import clock
from headway.pretrain.records.records import read_events


def run_of(path: str) -> Path:
    """A run folder that jobs were submitted for; raises JobError."""
    run = Path(path)
    jobs.submitted(run)
    return run


def known(run: Path) -> list[JobState]:
    """The run's jobs, as far as Slurm remembers them, in the order in which they were submitted."""
    return [state for job in jobs.submitted(run) for state in client.job_states(job)]


def status(path: str) -> None:
    """Print a run's jobs, and how far it has come."""
    run = run_of(path)
    table = Table(box=None, header_style="bold")
    for title in ("job", "state", "why it waits", "nodes", "starts", "ran", "limit", "exit"):
        table.add_column(title)
    for job in known(run):
        starts = "" if job.state in ("PENDING", "FORGOTTEN") and not job.restarts else str(job.restarts + 1)
        table.add_row(
            job.job, job.state, job.reason, job.nodes, starts, job.elapsed, job.limit, job.exit_code
        )
    out = console()
    out.print(table)
    for place in sweep(run) or [run]:
        out.print(f"{place}  {progress(place)}", markup=False)
    for fault in (line for line in jobs.notes(run) if line["kind"] == "fault"):
        where = f" on {', '.join(fault['nodes'])}" if fault["nodes"] else ""
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(fault["time"]))
        out.print(f"{when}  job {fault['job']}: fault{where}, exit code {fault['code']}, after the checkpoint of "
                  f"step {fault['step']}")  # fmt: skip


def sweep(run: Path) -> list[Path]:
    """Folders of a sweep's runs, if this is one."""
    lines = [line for line in jobs.notes(run) if line["kind"] == "submitted"]
    return [Path(place) for place in lines[-1].get("runs", [])]


def progress(run: Path) -> str:
    """How far a run is, in words."""
    if not (run / "job.yaml").exists():
        return "has not begun"
    steps = load_job(run / "job.yaml").job.train.steps
    rows, events = read_metrics(run), read_events(run)
    parts = [f"step {rows[-1]['step'] if rows else 0} of {steps}"]
    if rows:
        parts += [f"loss {rows[-1]['loss']:.4f}"]
    parts += [f"checkpoint of step {newest_step(run)}"]
    if events:
        last = events[-1]
        said = f"{last['kind']} {last.get('status', '')}".strip()
        parts += [f"last word {clock(time.time() - last['time'])} ago: {said}"]
    return ", ".join(parts)


def logs(path: str, lines: int, follow: bool) -> None:
    """Print the end of a run's newest log; with `follow`, then what is added, until interrupted.

    Raises:
        JobError: nothing has been written yet.
    """
    run = run_of(path)
    found = jobs.logs(run)
    if not found:
        raise JobError("run", path, "has no log yet: its job waits", f"headway launch status {path}")
    if follow:
        os.execvp("tail", ["tail", "-n", str(lines), "-F", str(found[-1])])
    text = found[-1].read_text(encoding="utf-8", errors="replace").splitlines()
    print("\n".join([f"{found[-1]}:", *text[-lines:]]))


def cancel(path: str, now: bool) -> None:
    """End a run's jobs: those that wait at once, those that run when they have saved, or `now`."""
    run = run_of(path)
    for place in [run, *sweep(run)]:
        jobs.slurm_folder(place).mkdir(parents=True, exist_ok=True)
        (jobs.slurm_folder(place) / jobs.CANCELLED).touch()
    live = [job for job in known(run) if not job.over]
    running = [job.job for job in live if job.state == "RUNNING"]
    client.cancel([job.job for job in live if now or job.state != "RUNNING"])
    for job in [] if now else running:
        client.ask_to_save(job)
    done = ", ".join(job.job for job in live) or "nothing is left to cancel"
    print(f"cancelled: {done}" + (f"; {', '.join(running)} will save first" if running and not now else ""))
