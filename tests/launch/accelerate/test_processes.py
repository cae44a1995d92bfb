"""The processes that a file of Accelerate asks for."""

import pytest

from headway.launch.accelerate.environment import refuse_lone, replicas
from headway.launch.accelerate.file import check_ranks, processes
from headway.launch.accelerate.job import find_processes
from headway.launch.environment import Ranks
from headway.launch.local import Hosts
from headway.pretrain.errors import JobError
from headway.tests.launch.accelerate.told import ALONE, FOUR, TWO, variables


def test_processes_of_a_file(written):
    assert processes(written(num_processes=4), None).ranks == Ranks(0, 4, 0, 4, "a config file of Accelerate")
    meet = {"main_process_ip": "10.0.0.1", "main_process_port": 29501, "rdzv_backend": "c10d"}
    found = processes(written(num_processes=8, num_machines=2, machine_rank=1, **meet), None)
    assert (found.local, found.hosts) == (4, Hosts(2, 1, "10.0.0.1", 29501, "c10d"))
    assert processes(written(num_processes=-1), 3).local == 3
    assert processes(written(num_processes=2), 2).local == 2


@pytest.mark.parametrize(
    ("more", "nproc", "message"),
    [
        ({"num_processes": 2}, 3, r"--nproc = 3: num_processes = 2 in .*: 2"),
        ({"num_processes": -1}, None, "leaves it to the command line.*--nproc N"),
        (
            {"num_processes": 3, "num_machines": 2},
            None,
            "num_processes = 3: must be a multiple of num_machines = 2",
        ),
        ({"num_processes": 2, "num_machines": 2}, None, "main_process_ip = None"),
        (
            {"num_processes": 2, "num_machines": 2, "machine_rank": 2}
            | {"main_process_ip": "a", "main_process_port": 1},
            None,
            "machine_rank = 2: must be one of 2 hosts",
        ),
    ],
)
def test_processes_that_cannot_be(more, nproc, message, written):
    with pytest.raises(JobError, match=message):
        processes(written(**more), nproc)


def test_ranks_that_others_started_are_counted(written):
    check_ranks(written(num_processes=2), TWO)
    check_ranks(written(num_processes=-1), FOUR)
    with pytest.raises(JobError, match="num_processes = 2: torchrun started 4"):
        check_ranks(written(num_processes=2), FOUR)


def test_gpus_of_a_file(written, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert find_processes(written(gpu_ids="0,1"), None).local == 2
    with pytest.raises(JobError, match="gpu_ids = '2,3': CUDA_VISIBLE_DEVICES is '0,1' here"):
        find_processes(written(gpu_ids="2,3"), None)


@pytest.mark.parametrize("options", ["--cpu", ""])
def test_a_process_that_was_to_be_several(options):
    """Without a flag that counts processes Accelerate starts one, whatever --num_processes says."""
    with pytest.raises(
        JobError, match=r"started this one alone.*--nproc N, or accelerate launch --multi_gpu"
    ):
        refuse_lone(variables(f"{options} --num_processes 2"), ALONE)
    refuse_lone(variables(f"{options} --num_processes 1"), ALONE)
    refuse_lone(variables("--multi_gpu --num_processes 2"), TWO)
    assert replicas(variables("--cpu --num_processes 1"), ALONE) == []
