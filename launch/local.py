"""Several ranks on this machine, beside those of other hosts if there are any, through torchrun's agent.

What a caller sees of `headway train R --nproc N`: 0, 2, 70 or 75, as of one rank. Of `torchrun --no-python headway
train R` it sees less: the agent ends with 1 whatever the ranks' codes were (it prints them, and signals), so that 75
cannot be told from 70. A batch script that is queued again on 75 starts its ranks by srun or mpirun instead.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from headway.pretrain.errors import HeadwayError, Interrupted, JobError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


class RankFailed(HeadwayError):
    """A rank ended with an error, which it has printed itself."""


@dataclass(frozen=True)
class Hosts:
    """Hosts that start ranks by a command of their own each, this one among them; they meet at the first."""

    count: int = 1
    here: int = 0
    address: str | None = None
    port: int | None = None
    rendezvous: str = "static"
    """Of torchrun's agents: static or c10d."""


def start(ranks: int, arguments: list[str], hosts: Hosts = Hosts()) -> None:
    """Run `headway ARGUMENTS` as `ranks` processes of this host; returns when all are done.

    A signal to this process goes on to all ranks, which save and stop.

    Raises:
        Interrupted: all ranks saved and stopped.
        RankFailed: names the rank that failed first, and the signal if one ended it.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # ranks speak for themselves
    # Workers read a peer's old address if the agent lends them its rendezvous store; and fewer threads each.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")  # seconds for ranks to save before SIGKILL
    alone = hosts.count == 1
    config = LaunchConfig(
        min_nodes=hosts.count,
        max_nodes=hosts.count,
        nproc_per_node=ranks,
        run_id=str(uuid.uuid4()) if alone else "headway",
        rdzv_backend="c10d" if alone else hosts.rendezvous,
        rdzv_endpoint="localhost:0" if alone else f"{hosts.address}:{hosts.port}",
        rdzv_configs={} if alone else {"rank": hosts.here},
        max_restarts=0,
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    )
    try:
        elastic_launch(config, headway_script())(*without_nproc(arguments))
    except ChildFailedError as error:
        raise told(error) from None
    except SignalException as error:
        raise Interrupted(f"stopped by {signal.Signals(error.sigval).name}; start again to go on") from None


MEANINGS = {
    signal.SIGKILL: "often: out of memory, see the kernel's log",
    signal.SIGABRT: "NCCL's watchdog does so when a collective takes too long, its message stands above",
}
"""What the signals that end ranks often mean."""


def told(error: ChildFailedError) -> HeadwayError:
    """What the end of the ranks means: that of the rank that was killed, if one was, else of the first that failed."""
    killed = {rank: f for rank, f in error.failures.items() if f.exitcode < 0}
    rank, failure = next(iter(killed.items())) if killed else error.get_first_failure()
    if failure.exitcode == Interrupted.exit_code:
        return Interrupted("all ranks saved and stopped; start again to go on")
    here = f"rank {rank} on host {socket.gethostname()}"
    if failure.exitcode < 0:
        number = signal.Signals(-failure.exitcode)
        meaning = f" ({MEANINGS[number]})" if number in MEANINGS else ""
        return RankFailed(f"{here} was killed by {number.name}{meaning}")
    failed = RankFailed(f"{here} ended with exit code {failure.exitcode}; its message stands above")
    failed.exit_code = JobError.exit_code if failure.exitcode == JobError.exit_code else failed.exit_code
    return failed


def headway_script() -> str:
    """The console script beside this Python, or on the PATH."""
    beside = Path(sys.executable).with_name("headway")
    found = str(beside) if beside.exists() else shutil.which("headway")
    if found is None:
        raise JobError(
            "--nproc", "headway", "the console script `headway` is not installed", "pip install -e ."
        )
    return found


def without_nproc(arguments: list[str]) -> list[str]:
    """Command line of a rank: the same, without --nproc."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--nproc":
            skip = True
        elif not argument.startswith("--nproc="):
            kept.append(argument)
    return kept
