"""The variables of each launcher give the same answer to "who am I" and "where do we meet"."""

import pytest

from headway.launch import master
from headway.launch.environment import Ranks, find_ranks
from headway.launch.local import without_nproc
from headway.launch.master import find_address, find_port, first_host, set_master
from headway.pretrain.errors import JobError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
# As recorded from a task of `srun -N2 -n8` in a batch job, Slurm 22.05 (23.02 and 24.05 name these the same).
SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_JOB_NODELIST": "r[1-3]",
    "SLURM_JOB_NUM_NODES": "3",
    "SLURM_NTASKS": "12",
    "SLURM_TASKS_PER_NODE": "4(x3)",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "r[2-3]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
# As recorded from Open MPI 4.1 and MPICH 4.0; Intel MPI sets the same names as MPICH.
OPEN_MPI = {
    f"OMPI_COMM_WORLD_{k}": v
    for k, v in zip(("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"), "5814", strict=True)
} | {"PMIX_RANK": "5", "PMIX_NAMESPACE": "18481153"}
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4", "PMI_FD": "8"}


def changed(environment, **values):
    """An environment with other values; None takes a variable away."""
    return {name: value for name, value in (environment | values).items() if value is not None}


def test_alone():
    assert find_ranks({}) == Ranks(0, 1, 0, 1, "single process")
    assert find_ranks({"WORLD_SIZE": "1"}).world == 1
    assert find_ranks(changed(SRUN, SLURM_STEP_ID=None)).world == 1  # a batch script's own shell


@pytest.mark.parametrize(
    ("environment", "source"),
    [
        (TORCHRUN, "torchrun"),
        (SRUN, "srun"),
        (
            SRUN | {"WORLD_SIZE": "8", "PMI_RANK": "5", "PMI_SIZE": "8"},
            "srun",
        ),  # a script's export; srun --mpi=pmi2
        (SRUN | TORCHRUN, "torchrun"),  # started by srun
        (OPEN_MPI, "Open MPI"),
        (
            changed(SRUN, SLURM_PROCID="1", SLURM_STEP_NUM_TASKS="2") | OPEN_MPI,
            "Open MPI",
        ),  # srun started its daemons
        (MPICH, "MPICH"),
    ],
)
def test_launchers(environment, source):
    assert find_ranks(environment) == Ranks(5, 8, 1, 4, source)


@pytest.mark.parametrize(
    ("per_node", "node", "expected"), [("4(x2)", 1, 4), ("5,3", 1, 3), ("6,1(x2)", 2, 1), ("4", 1, 4)]
)
@pytest.mark.parametrize(
    "name", ["SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"]
)
def test_tasks_of_a_node(name, per_node, node, expected):
    """The last of the three names is there alone in a shell whose variables a container passes on in part."""
    bare = changed(SRUN, SLURM_STEP_TASKS_PER_NODE=None, SLURM_TASKS_PER_NODE=None, SLURM_LOCALID="0")
    assert find_ranks(bare | {name: per_node, "SLURM_NODEID": str(node)}).local_world == expected


def test_plain_variables():
    two = {"RANK": "1", "WORLD_SIZE": "2"}
    assert find_ranks(two) == find_ranks(two | {"MASTER_ADDR": "127.0.0.1"})
    assert find_ranks(two) == Ranks(1, 2, 1, 2, "RANK and WORLD_SIZE")
    apart = find_ranks(two | {"MASTER_ADDR": "gpu7"})
    assert (apart.local_rank, apart.one_host) == (0, False)
    assert find_ranks(two | {"MASTER_ADDR": "gpu7", "LOCAL_RANK": "1"}).local_rank == 1


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (changed(TORCHRUN, RANK="x"), "RANK = 'x'"),
        (changed(TORCHRUN, RANK="-1"), "RANK = '-1'"),
        (changed(TORCHRUN, RANK="8"), "rank = 8: torchrun counts 8 ranks, numbered from 0"),
        (changed(TORCHRUN, LOCAL_RANK="4"), "local rank = 4: torchrun counts 4 ranks of its host"),
        (changed(TORCHRUN, LOCAL_WORLD_SIZE="9"), "ranks of this host = 9: a host has at most all of the 8"),
        (changed(TORCHRUN, WORLD_SIZE=None), "RANK = '5': RANK and WORLD_SIZE are set together"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE = 8: there is no RANK beside it, and single process means 1 rank"),
        (SRUN | {"WORLD_SIZE": "12"}, "WORLD_SIZE = 12: there is no RANK beside it, and srun means 8 rank"),
        (changed(SRUN, SLURM_STEP_TASKS_PER_NODE="4x2"), "SLURM_STEP_TASKS_PER_NODE = '4x2'"),
        (changed(OPEN_MPI, OMPI_COMM_WORLD_SIZE="2"), "rank = 5: Open MPI counts 2"),
    ],
)
def test_contradictions_are_named(environment, message):
    with pytest.raises(JobError, match=message.replace("(", r"\(")):
        find_ranks(environment)


def test_hosts_of_slurm():
    assert first_host("node1") == "node1"
    assert first_host("gpu[003-017,20],cpu1") == "gpu003"
    assert first_host("r[1-2]n[03,05-7]-ib,gpu7") == "r1n03-ib"
    assert first_host("a,b[1-2]") == "a"


def test_a_step_meets_at_its_first_host(monkeypatch):
    environment = dict(SRUN)
    monkeypatch.setattr(master, "resolves", lambda host: host == "r2")
    set_master(find_ranks(environment), environment)
    assert environment["MASTER_ADDR"] == "r2"
    assert environment["MASTER_PORT"] == str(20000 + (17 * 1234 + 2) % 10000)
    given = SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}
    set_master(find_ranks(given), given)
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("10.0.0.1", "4000")


def test_a_host_without_a_name_is_met_at_the_address_that_slurm_knows(monkeypatch, tmp_path):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        '#!/bin/sh\necho "NodeName=$3 Arch=x86_64"\necho "   NodeAddr=10.1.0.$# NodeHostName=vm"\n'
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(master, "resolves", lambda host: False)
    assert find_address(find_ranks(SRUN), SRUN) == "10.1.0.3"
    scontrol.unlink()
    with pytest.raises(JobError, match="MASTER_ADDR = 'r2': the first host of"):
        find_address(find_ranks(SRUN), SRUN)


def test_ports_of_jobs_and_steps_differ():
    ports = set()
    for job in range(1000, 1020):
        for step in range(10):
            environment = SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}
            ports.add(find_port(find_ranks(environment), environment))
    assert len(ports) == 200


@pytest.mark.parametrize("environment", [OPEN_MPI, MPICH])
def test_mpi_on_several_hosts_needs_to_be_told_where(environment):
    environment = dict(environment)
    with pytest.raises(JobError, match=r"MASTER_ADDR = None: .* spreads 8 ranks over several hosts .*export"):
        set_master(find_ranks(environment), environment)
    environment["MASTER_ADDR"] = "gpu7"
    set_master(find_ranks(environment), environment)
    assert environment["MASTER_PORT"] == "29500"


def test_a_port_of_0_is_none():
    """As `accelerate launch --mpirun_hostfile FILE --main_process_port 0` has it."""
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    set_master(Ranks(1, 2, 1, 2, "RANK and WORLD_SIZE"), environment)
    assert environment["MASTER_PORT"] == str(master.DEFAULT_PORT)


def test_restarts_by_torchrun_need_a_store_of_their_own():
    environment = TORCHRUN | {"MASTER_ADDR": "a", "MASTER_PORT": "1", "TORCHELASTIC_MAX_RESTARTS": "3"}
    set_master(find_ranks(environment), environment | {"TORCHELASTIC_USE_AGENT_STORE": "False"})
    with pytest.raises(JobError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        set_master(find_ranks(environment), environment | {"TORCHELASTIC_USE_AGENT_STORE": "True"})


@pytest.mark.parametrize("given", [["--nproc", "4"], ["--nproc=4"]])
def test_ranks_get_the_command_line_without_nproc(given):
    assert without_nproc(["train", "gpt/tiny", *given, "--set", "a=b"]) == [
        "train",
        "gpt/tiny",
        "--set",
        "a=b",
    ]
