"""Slurm's own commands, as functions."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from headway.pretrain.errors import HeadwayError, JobError

PATIENCE = 60
"""Seconds that a command of Slurm may take: a controller that restarts answers late."""
GONE = "Invalid job id"


class SlurmError(HeadwayError):
    """A command of Slurm that failed; with what it said."""


@dataclass(frozen=True)
class JobState:
    """A job as the controller knows it.

    Attributes:
        state: `PENDING`, `RUNNING`, `COMPLETED`...; `FORGOTTEN` if the controller knows it no more.
        reason: why it waits.
        log: file that its output goes to.
        script: file that was submitted.
        restarts: how often it was started again.
    """

    job: str
    state: str
    reason: str = ""
    nodes: str = ""
    restarts: int = 0
    elapsed: str = ""
    limit: str = ""
    exit_code: str = ""
    log: str = ""
    script: str = ""

    @property
    def over(self) -> bool:
        return self.state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED")


def call(*command: str) -> str:
    """Run a command of Slurm; what it printed.

    Raises:
        JobError: Slurm is not installed here.
        SlurmError: the command failed.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except FileNotFoundError:
        rule = "Slurm's commands are not on this machine; run this on a login node, or look with --dry-run"
        raise JobError("headway launch", command[0], rule) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} did not answer within {PATIENCE} s; is slurmctld up?") from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise SlurmError(f"{' '.join(command)}: {said}")
    return done.stdout


def submit(script: str, *options: str) -> str:
    """Submit a script; the job's id."""
    return call("sbatch", "--parsable", *options, script).strip().split(";")[0]


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs, waiting ones and running ones. Those that are over are passed."""
    if jobs:
        call("scancel", "--quiet", *jobs)


def ask_to_save(job: str) -> None:
    """Signal the ranks of a running job to save and end."""
    call("scancel", "--quiet", "--signal=USR1", job)


def requeue(job: str) -> None:
    call("scontrol", "requeue", job)


def job_states(job: str) -> list[JobState]:
    """A job, or all tasks of an array."""
    try:
        told = call("scontrol", "--oneliner", "show", "job", job)
    except SlurmError as error:
        if GONE in str(error):
            return [JobState(job, "FORGOTTEN")]
        raise
    return [parse_job(line) for line in told.splitlines() if line.strip()]


def parse_job(line: str) -> JobState:
    """A line of `scontrol --oneliner show job`."""
    found = dict(re.findall(r"(\w+)=(.*?)(?=\s+\w+=|\s*$)", line))
    task = found.get("ArrayTaskId")
    job = f"{found['ArrayJobId']}_{task}" if task else found.get("JobId", "?")
    shown = {key: value for key, value in found.items() if value not in ("(null)", "None", "N/A")}
    return JobState(
        job,
        found.get("JobState", "?"),
        shown.get("Reason", ""),
        shown.get("NodeList", ""),
        int(found.get("Restarts", 0)),
        shown.get("RunTime", ""),
        shown.get("TimeLimit", ""),
        shown.get("ExitCode", ""),
        shown.get("StdOut", ""),
        shown.get("Command", ""),
    )


def leave_out(job: str, nodes: Sequence[str]) -> None:
    """Keep a waiting job off nodes."""
    call("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}")
