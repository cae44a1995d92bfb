"""Whole runs under Accelerate's launcher and by its files."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest

from headway.launch import run
from headway.pretrain.recipe import load_job
from headway.pretrain.records.metrics import read_metrics
from headway.tests.launch.test_train import HEADWAY

SETS = ("precision=fp64", "train.steps=3", "checkpoint.every=0", "run.name=run")


def options_of(sets):
    return [part for each in sets for part in ("--set", each)]


@pytest.fixture(scope="module")
def alone(small_job, tmp_path_factory):
    """Losses of one process."""
    folder = tmp_path_factory.mktemp("alone")
    run.train([str(small_job)], [f"run.dir={folder}", *SETS])
    return [row["loss"] for row in read_metrics(folder / "run")]


def start(command, tmp_path, **more):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MASTER_", "RANK", "WORLD_SIZE"))}
    environment |= {"HF_HOME": str(tmp_path / "hf"), **more}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


LAUNCH = (sys.executable, "-m", "accelerate.commands.launch")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "axis"),
    [
        pytest.param(("--multi_gpu",), "replicate 2", marks=pytest.mark.matrix),
        pytest.param(("--use_fsdp", "--fsdp_version", "2"), "shard 2", marks=pytest.mark.matrix),
        pytest.param(("--cpu", "--mpirun_hostfile"), "replicate 2", marks=pytest.mark.matrix),
    ],
    ids=["multi_gpu", "fsdp", "mpirun"],
)
def test_two_ranks_of_accelerate_launch_draw_the_curve_of_one(options, axis, alone, small_job, tmp_path):
    port = 0
    if "--mpirun_hostfile" in options:
        if not shutil.which("mpirun") or "Open MPI" not in subprocess.getoutput("mpirun --version"):
            pytest.skip("NOT TESTED: mpirun is not Open MPI's (apt install openmpi-bin)")
        (tmp_path / "hosts").write_text("localhost slots=2\n")
        options = *options, str(tmp_path / "hosts")
    command = [
        *LAUNCH,
        *options,
        "--num_processes",
        "2",
        "--main_process_port",
        str(port),
        "--no_python",
        *HEADWAY,
    ]
    command += ["train", str(small_job), *options_of([f"run.dir={tmp_path}", *SETS])]
    done = start(command, tmp_path, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    assert done.returncode == 0, done.stderr
    assert f"2 rank(s), {axis}" in done.stdout
    assert "ACCELERATE_MIXED_PRECISION = no -> precision = fp64 (command line) stands" in done.stdout
    losses = [row["loss"] for row in read_metrics(tmp_path / "run")]
    assert losses == pytest.approx(alone, rel=1e-12)  # fp64; sums of two ranks are added in another order
    origin = load_job(tmp_path / "run" / "job.yaml").origins
    assert origin["parallel.reshard" if "--use_fsdp" in options else "parallel.shard"].startswith(
        "accelerate: "
    )
    assert origin["optimizer.lr"] == str(small_job)
    launcher = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[0])["launcher"]
    assert launcher == "accelerate launch, " + ("Open MPI" if "--cpu" in options else "torchrun")


@pytest.mark.matrix
def test_a_lone_process_is_refused_under_the_launcher(small_job, tmp_path):
    done = start(
        [*LAUNCH, "--cpu", "--num_processes", "2", "--no_python", *HEADWAY, "train", str(small_job)], tmp_path
    )
    assert done.returncode != 0
    assert "headway: accelerate launch --num_processes" in done.stderr
    assert "started this one alone" in done.stderr


@pytest.mark.matrix
def test_a_file_starts_its_ranks(alone, small_job, written, tmp_path):
    file = written("MULTI_CPU", use_cpu=True)
    command = [
        *HEADWAY,
        "train",
        str(small_job),
        "--accelerate",
        file,
        *options_of([f"run.dir={tmp_path}", *SETS]),
    ]
    done = start(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 rank(s), replicate 2" in done.stdout
    assert [row["loss"] for row in read_metrics(tmp_path / "run")] == pytest.approx(alone, rel=1e-12)


@pytest.mark.matrix
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_two_hosts_of_a_file_meet(rendezvous, alone, small_job, written, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = {
        "num_machines": 2,
        "main_process_ip": "127.0.0.1",
        "main_process_port": port,
        "rdzv_backend": rendezvous,
    }
    agents = []
    for host in (0, 1):
        file = written("MULTI_CPU", f"{host}.yaml", machine_rank=host, use_cpu=True, **meet)
        more = options_of([f"run.dir={tmp_path}", *SETS])
        command = [*HEADWAY, "train", str(small_job), "--accelerate", file, *more]
        agents.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert [row["loss"] for row in read_metrics(tmp_path / "run")] == pytest.approx(alone, rel=1e-12)
