"""What a batch script does when its ranks have ended: nothing more, start again, leave a node out, or give up."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from headway.launch.environment import this_start
from headway.launch.slurm import client, jobs
from headway.parallel.checkpoint.retention import latest, step_of
from headway.pretrain.errors import HeadwayError, Interrupted, JobError

STOPPED = (Interrupted.exit_code, 128 + 10, 128 + 15)
"""Codes of ranks that saved, and of those that a signal met before they had anything to save (SIGUSR1, SIGTERM)."""
_SAID = re.compile(r"^srun: error: (\S+): tasks? [\d,\-]+: (.*)$", re.MULTILINE)
_CODE = re.compile(r"Exited with exit code (\d+)")
_BY_SRUN, _BY_USR1 = "Terminated", "User defined signal 1"
"""What srun says of ranks that it ended because another one had ended, and of those that a signal met early."""


@dataclass(frozen=True)
class Rules:
    """When to start again; as in `Request`."""

    requeue: bool = True
    max_faults: int = 3
    exclude_after: int = 2


@dataclass(frozen=True)
class Decision:
    """What to do, and why, in words for the log.

    Attributes:
        what: `end`: nothing of the run waits any more; `leave`: to Slurm; `again`: start this job again; `next`: leave
            it to the next job of the chain.
        exclude: nodes to leave out when starting again.
    """

    what: Literal["end", "leave", "again", "next"]
    why: str
    exclude: tuple[str, ...] = ()


def decide(
    code: int,
    state: str,
    rules: Rules,
    ends: Sequence[Mapping[str, Any]],
    *,
    next_link: bool,
    cancelled: bool,
) -> Decision:
    """From how the ranks ended to what is done.

    Args:
        code: exit code of the ranks.
        state: of this job, as Slurm has it.
        ends: the run's noted faults and stops, this one included; with `step` (of the newest checkpoint) and `nodes`.
        next_link: another job of the chain waits for the end of this one.
        cancelled: a person has cancelled the run.
    """
    if state != "RUNNING":  # first: when a node is lost, srun ends with 0
        return Decision("leave", f"Slurm has ended the job ({state}), and starts it again if it is to be")
    if code == 0:
        return Decision("end", "the run is complete")
    if cancelled:
        return Decision("end", "the run was cancelled")
    if code == JobError.exit_code:
        return Decision("end", "the job or its command line is wrong; the message stands above")
    if code in STOPPED:
        return _after_stop(rules, ends, next_link)
    return _after_fault(code, rules, ends, next_link)


def _in_a_row(ends: Sequence[Mapping[str, Any]]) -> int:
    """Ends since the newest checkpoint is the one that it is."""
    return len(list(takewhile(lambda end: end["step"] == ends[-1]["step"], reversed(ends))))


def _after_stop(rules: Rules, ends: Sequence[Mapping[str, Any]], next_link: bool) -> Decision:
    """Ranks that are always stopped before they have begun would be started for ever."""
    if (in_vain := _in_a_row(ends) - 1) > rules.max_faults:
        why = f"stopped {in_vain} times in a row before there was a new checkpoint: is --time too short?"
        return Decision("end", why)
    return _again("the ranks were asked to stop, and saved", rules, next_link)


def _after_fault(code: int, rules: Rules, ends: Sequence[Mapping[str, Any]], next_link: bool) -> Decision:
    in_a_row = _in_a_row(ends)
    if in_a_row > rules.max_faults:
        return Decision("end", f"{in_a_row} faults in a row without a new checkpoint")
    counts = Counter(node for end in ends for node in end["nodes"])
    bad = tuple(
        sorted(n for n, count in counts.items() if rules.exclude_after and count >= rules.exclude_after)
    )
    where = f" on {', '.join(ends[-1]['nodes'])}" if ends[-1]["nodes"] else ""
    why = f"a fault{where} (exit code {code}), the {in_a_row}. without a new checkpoint"
    return _again(why, rules, next_link, bad)


def _again(why: str, rules: Rules, next_link: bool, exclude: tuple[str, ...] = ()) -> Decision:
    if next_link:
        return Decision("next", f"{why}; the next job of the chain goes on", exclude)
    if not rules.requeue:
        return Decision("end", f"{why}; the job is not to be requeued")
    return Decision("again", why, exclude)


def after(run: Path, code: int, rules: Rules, *, asked: bool = False) -> int:
    """Decide, say so in the job's log, and do it; the exit code of the batch script.

    Args:
        asked: the script was asked to stop; an agent that hides the codes of its ranks says 1 then.
    """
    me = client.job_states(this_job())[0]
    if me.restarts > this_start().count:  # this node is dead for Slurm, and the script has not noticed
        print(f"== job {me.job}: Slurm has started it again, on {me.nodes or 'other nodes'}", flush=True)
        return code
    code, nodes = first_to_end(code, since_start(end_of(me.log))) if code else (0, [])
    code = Interrupted.exit_code if asked and code else code
    waiting = chain_behind(run, me.job)
    if code not in (0, JobError.exit_code) and me.state == "RUNNING":
        kind, to_blame = ("stop", []) if code in STOPPED else ("fault", nodes)
        jobs.note(run, kind, job=me.job, code=code, nodes=to_blame, step=newest_step(run))
    ends = [line for line in jobs.notes(run) if line["kind"] in ("fault", "stop")]
    cancelled = (jobs.slurm_folder(run) / jobs.CANCELLED).exists()
    decision = decide(code, me.state, rules, ends, next_link=bool(waiting), cancelled=cancelled)
    print(f"== job {me.job}: {decision.why}", flush=True)
    carry_out(decision, run, me, waiting)
    return Interrupted.exit_code if code in STOPPED else code


def carry_out(decision: Decision, run: Path, me: client.JobState, waiting: Sequence[str]) -> None:
    """Tell Slurm. The last thing that a requeued job does: Slurm ends its script."""
    if decision.what == "end":
        client.cancel(waiting)
    elif decision.what == "next" and decision.exclude:
        for one in waiting:
            client.leave_out(one, decision.exclude)
    elif decision.what == "again":
        if set(decision.exclude) - set(left_out(run)) and resubmit(run, me, decision.exclude):
            return
        print(f"== job {me.job} is requeued", flush=True)
        client.requeue(me.job)


def resubmit(run: Path, me: client.JobState, exclude: Sequence[str]) -> bool:
    """Slurm does not change the nodes of a job that runs: another one takes its place, without those nodes. False if
    Slurm refuses it, for want of other nodes perhaps."""
    _, _, task = me.job.partition("_")
    array = [f"--array={task}"] if task else []
    try:
        new = client.submit(me.script, f"--exclude={','.join(exclude)}", *array)
    except client.SlurmError as error:
        print(f"== job {me.job}: {', '.join(exclude)} cannot be left out: {error}", flush=True)
        return False
    new = f"{new}_{task}" if task else new
    log = str(Path(me.log).with_name(f"{new}.log"))
    jobs.note(run, "submitted", job=new, after=me.job, without=list(exclude), log=log)
    print(f"== job {new} goes on without {', '.join(exclude)}", flush=True)
    return True


def left_out(run: Path) -> list[str]:
    """Nodes that the present job was already submitted without."""
    lines = [line for line in jobs.notes(run) if line["kind"] == "submitted"]
    return list(lines[-1].get("without", [])) if lines else []


def this_job(environment: Mapping[str, str] = os.environ) -> str:
    """Id of the job that this process belongs to, with the place in its array; raises JobError outside of any."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    if "SLURM_JOB_ID" not in environment:
        raise JobError("headway launch after", None, "is a part of batch scripts: SLURM_JOB_ID is not set")
    return environment["SLURM_JOB_ID"]


def chain_behind(run: Path, job: str) -> list[str]:
    """Jobs of the chain after this one that still wait."""
    lines = [line for line in jobs.notes(run) if line["kind"] == "submitted"]
    after = {line.get("after"): str(line["job"]) for line in lines}
    found: list[str] = []
    while (job := after.get(job, "")) and len(found) < len(lines):
        if client.job_states(job)[0].state == "PENDING":
            found.append(job)
    return found


def newest_step(run: Path) -> int:
    """Step of the newest checkpoint, 0 without one."""
    path = latest(run / "checkpoints")
    return (step_of(path.name) or 0) if path else 0


def since_start(log: str) -> str:
    """The log from the last start of the job on."""
    return log[log.rfind("\n== ") + 1 :]


def first_to_end(code: int, log: str) -> tuple[int, list[str]]:
    """The code of the rank that ended first by itself, and its node, as srun tells them in the job's log.

    srun itself gives the highest code, which may be that of ranks that it ended thereafter. Those that fail next fail
    because the first one is gone; and where ranks of several nodes fail at once, none of these is to blame.
    """
    for node, how in _SAID.findall(log):
        if how == _BY_SRUN:
            continue
        blamed = [] if set(node) & set("[,") else [node]
        if found := _CODE.match(how):
            return int(found[1]), blamed
        return (128 + 10 if how == _BY_USR1 else max(code, HeadwayError.exit_code)), blamed
    return code, []


def end_of(log: str) -> str:
    """The last mebibyte of a file; nothing if there is none."""
    path = Path(log)
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 2**20))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
