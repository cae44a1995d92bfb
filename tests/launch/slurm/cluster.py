"""A real Slurm of several nodes on this machine, of the tests' own: munged, slurmctld and a slurmd for each node.

    with Cluster(nodes=3) as cluster:
        job = cluster.submit(script, "--nodes=2")
        cluster.wait(job, {"COMPLETED"}, timeout=30)

All of it (configuration, sockets, logs, spools, process numbers) is in one temporary folder, talks on loopback and on
ports that were free, and ends with `close()`: several clusters may run at once. Nodes have 8 pretended CPUs and 4
pretended GPUs (terminals stand for the devices). Partitions: `main`, and over the same nodes `low`, whose jobs are
requeued when a job in `high` wants their nodes.

A node ends in one of two ways. `kill_node` is a power cut: slurmd and all that it started are gone. `cut_off` kills
slurmd alone: Slurm takes the node for dead and requeues its jobs, while what ran there runs on and writes.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Self

CONFIGURATION = """\
ClusterName=headway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool/%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdTimeout={node_timeout}
KillWait=5
MessageTimeout=4
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=5 PreemptMode=OFF MaxTime=INFINITE
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace} MaxTime=INFINITE
PartitionName=high Nodes=ALL PriorityTier=9 PreemptMode=OFF MaxTime=INFINITE
"""

NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=4000 Gres=gpu:4"

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")
SEARCH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # daemons are not on every user's path

# Whose process it is: daemons and their children are started with it; a task has the folder in SLURM_CONF instead.
OWNER = "HEADWAY_VIRTUAL_NODE"


class ClusterError(AssertionError):
    """The cluster did not do what a test waited for; the message has the ends of the logs."""


def missing() -> str:
    """Why no cluster can run here; empty if one can."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=SEARCH) is None]
    if absent:
        return f"Slurm is not installed (.ci/slurm.sh): no {', '.join(absent)}"
    return "" if os.geteuid() == 0 else "the virtual Slurm cluster needs root"


class Cluster:
    """A running cluster; see this module.

    Args:
        nodes: how many; they are called node1, node2, ...
        node_timeout: seconds without an answer after which Slurm takes a node for dead.
        grace: seconds between the notice and the end of a job of `low` that is preempted.
    """

    def __init__(self, nodes: int = 3, node_timeout: int = 6, grace: int = 30) -> None:
        self.names = [f"node{number + 1}" for number in range(nodes)]
        self.folder = Path(tempfile.mkdtemp(prefix="headway-slurm-"))  # short: a socket's path has 107 bytes
        self.conf = self.folder / "slurm.conf"
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))
        } | {"SLURM_CONF": str(self.conf), "PATH": SEARCH}
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        try:
            self._write(node_timeout, grace)
            self._start_munge()
            self._start("slurmctld", "slurmctld", "-D", "-i", "-f", str(self.conf))
            for name in self.names:
                self.revive(name)
            poll(self._all_idle, 30, self._trouble("nodes that are idle"))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- jobs --------------------------------------------------------------------------------------------------

    def submit(self, script: str, *options: str, cwd: Path | None = None) -> str:
        """Hand a batch script to sbatch; the number of its job."""
        said = self.run("sbatch", "--parsable", *options, stdin=script, cwd=cwd)
        return said.strip().partition(";")[0]

    def describe(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`, of an array's first task that is listed."""
        line = self.run("scontrol", "--oneliner", "show", "job", job).splitlines()[0]
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    def state(self, job: str) -> str:
        """RUNNING, PENDING, COMPLETED, ..."""
        return self.describe(job)["JobState"]

    def restarts(self, job: str) -> int:
        """How often a job was requeued."""
        return int(self.describe(job)["Restarts"])

    def wait(self, job: str, states: Iterable[str], timeout: float) -> str:
        """Wait until a job is in one of the states; the state. Raises ClusterError."""
        wanted = set(states)
        last = {"state": ""}

        def reached() -> bool:
            last["state"] = self.state(job)
            return last["state"] in wanted

        poll(reached, timeout, lambda: f"{job} is {last['state']}, not {wanted}\n{self.job_log(job)}")
        return last["state"]

    def wait_for_restart(self, job: str, times: int, timeout: float) -> None:
        """Wait until a job runs that was requeued so often, or has ended after it."""

        def reached() -> bool:
            found = self.describe(job)
            return int(found["Restarts"]) >= times and found["JobState"] not in ("PENDING", "COMPLETING")

        poll(reached, timeout, lambda: f"{job} was not restarted: {self.describe(job)}\n{self.job_log(job)}")

    def requeue(self, job: str) -> None:
        self.run("scontrol", "requeue", job)

    def cancel(self, job: str) -> None:
        self.run("scancel", job)

    def signal(self, job: str, name: str = "USR1") -> None:
        """Signal the processes of a job's steps, as Slurm does before a time limit."""
        self.run("scancel", f"--signal={name}", job)

    def job_log(self, job: str) -> str:
        """What a job has printed, to the file that Slurm knows of."""
        path = Path(self.describe(job).get("StdOut", ""))
        return path.read_text(errors="replace") if path.is_file() else ""

    def hosts(self, job: str) -> list[str]:
        """The nodes that a job runs on."""
        nodes = self.describe(job)["NodeList"]
        return self.run("scontrol", "show", "hostnames", nodes).split() if nodes != "(null)" else []

    def clear(self) -> None:
        """Cancel all jobs, and have every node back: the cluster as a test finds it."""
        self.run("scancel", "--user=root")
        for name in self.names:
            if self._children[f"slurmd-{name}"].poll() is not None:
                self.revive(name)
        poll(self._all_idle, 60, self._trouble("nodes that are idle again"))
        for name in self.names:
            kill(self.processes(name))  # of a node that was cut off

    # -- nodes -------------------------------------------------------------------------------------------------

    def kill_node(self, name: str) -> None:
        """A power cut: SIGKILL to a node's slurmd and to everything that it started."""
        self.cut_off(name)
        poll(lambda: not kill(self._processes(name)), 10, lambda: f"processes of {name} do not end")

    def cut_off(self, name: str) -> None:
        """SIGKILL to a node's slurmd alone: dead for Slurm, while its jobs' processes run on."""
        self._children[f"slurmd-{name}"].kill()
        self._children[f"slurmd-{name}"].wait()

    def revive(self, name: str) -> None:
        """Start a node's slurmd (again)."""
        (self.folder / "spool" / name).mkdir(parents=True, exist_ok=True)
        label = f"{self.folder}:{name}"
        self._start(f"slurmd-{name}", "slurmd", "-D", "-N", name, "-f", str(self.conf), label=label)

    def node_state(self, name: str) -> str:
        """As sinfo has it: idle, allocated, down, ..."""
        return self.run("sinfo", "--noheader", f"--nodes={name}", "--partition=main", "--format=%T").strip()

    def processes(self, name: str) -> list[int]:
        """What runs on a node without its slurmd: steps and the tasks of jobs."""
        return [pid for pid in self._processes(name) if pid != self._children[f"slurmd-{name}"].pid]

    def ranks(self, name: str) -> list[int]:
        """The tasks of steps on a node: what srun has started there."""
        return [pid for pid in self.processes(name) if b"SLURM_STEP_ID" in variables(pid)]

    # -- the rest ----------------------------------------------------------------------------------------------

    def run(self, *command: str, stdin: str | None = None, cwd: Path | None = None) -> str:
        """What a command of Slurm prints. Raises ClusterError with what it complains of."""
        done = subprocess.run(
            command,
            input=stdin,
            cwd=cwd or self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise ClusterError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def close(self) -> None:
        """Kill everything that the cluster has started, and remove its folder."""
        for child in self._children.values():
            child.kill()
            child.wait()
        poll(lambda: not kill(self._processes()), 10, lambda: "processes of the cluster do not end")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, node_timeout: int, grace: int) -> None:
        host = socket.gethostname()
        controller_port, *ports = free_ports(1 + len(self.names))
        nodes = [
            NODE.format(name=name, host=host, port=port) for name, port in zip(self.names, ports, strict=True)
        ]
        self.conf.write_text(
            CONFIGURATION.format(
                host=host,
                controller_port=controller_port,
                folder=self.folder,
                nodes="\n".join(nodes),
                node_timeout=node_timeout,
                grace=grace,
            )
        )
        gres = [f"NodeName={name} Name=gpu File=/dev/tty[1-4]" for name in self.names]
        (self.folder / "gres.conf").write_text("\n".join(gres) + "\n")
        for name in ("state", "spool"):
            (self.folder / name).mkdir()

    def _start_munge(self) -> None:
        key, place = self.folder / "munge.key", self.folder / "munge.sock"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = [f"--key-file={key}", f"--socket={place}"]
        files += [f"--{kind}-file={self.folder}/munged.{kind}" for kind in ("pid", "log", "seed")]
        self._start(
            "munged", "munged", "--foreground", "--force", *files
        )  # --force: the folder is root's alone
        poll(place.exists, 10, self._trouble("munge's socket"))

    def _start(self, name: str, *command: str, label: str = "") -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self._children[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self.environment | {OWNER: label or str(self.folder)},
                start_new_session=True,  # Ctrl-C is for the tests
            )

    def _all_idle(self) -> bool:
        dead = [name for name, child in self._children.items() if child.poll() is not None]
        if dead:
            raise ClusterError(f"ended: {dead}\n{self._logs()}")
        try:  # sinfo may call a node mixed for a minute after its last job: what counts is that there are no jobs
            well = all(self.node_state(name) in ("idle", "mixed", "allocated") for name in self.names)
            return well and not self.run("squeue", "--noheader").strip()
        except ClusterError:  # slurmctld is not up yet
            return False

    def _processes(self, name: str = "") -> list[int]:
        """Processes of a node, or of the whole cluster."""
        names = [name] if name else self.names
        labels = [f"{self.folder}:{one}" for one in names] + ([] if name else [str(self.folder)])
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            theirs = variables(int(path.name))
            of_job = theirs.get(b"SLURM_CONF") == str(self.conf).encode()
            if theirs.get(OWNER.encode(), b"").decode() in labels or (
                of_job and (not name or theirs.get(b"SLURMD_NODENAME") == name.encode())
            ):
                found.append(int(path.name))
        return [pid for pid in found if pid != os.getpid()]

    def _trouble(self, awaited: str) -> Callable[[], str]:
        return lambda: f"no {awaited}: {self._run_anyhow('sinfo', '-N', '-o', '%N %T %E')}\n{self._logs()}"

    def _run_anyhow(self, *command: str) -> str:
        """What a command says, if it does: for messages about trouble."""
        try:
            return self.run(*command)
        except ClusterError as error:
            return str(error)

    def _logs(self) -> str:
        ends = []
        for path in sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")]):
            lines = path.read_text(errors="replace").splitlines()[-10:]
            if lines and not (path.suffix == ".out" and path.with_suffix(".log").exists()):  # the same, twice
                ends += [f"== {path.name}", *lines]
        return "\n".join(ends)


def variables(pid: int) -> dict[bytes, bytes]:
    """The environment that a process was started with; empty if it has ended."""
    try:
        pairs = (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(pair.split(b"=", 1) for pair in pairs if b"=" in pair)


def kill(processes: Iterable[int]) -> list[int]:
    """SIGKILL to those that run; which they were."""
    found = list(processes)
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return found


def poll(reached: Callable[[], bool], timeout: float, complaint: Callable[[], str]) -> float:
    """Ask until it is so; the seconds that it took. Raises ClusterError with the complaint after the time-out."""
    start = time.monotonic()
    while not reached():
        if time.monotonic() - start > timeout:
            raise ClusterError(f"after {timeout:g} s: {complaint()}")
        time.sleep(0.1)
    return time.monotonic() - start


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody has, outside the range that connections are given theirs from."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(15_000, 32_000), 2000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise ClusterError(f"no {count} free ports on loopback")
