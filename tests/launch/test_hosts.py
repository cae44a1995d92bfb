"""Runs over two hosts with a network between them: the curve of one host, and what is said when a link is cut."""

import sys
import time

import pytest

from headway.launch import run
from headway.launch.ledger import show
from headway.pretrain.records.metrics import read_metrics
from headway.tests.launch.hosts import ADDRESSES, NAMES, Hosts, NoHosts
from headway.tests.launch.test_train import HEADWAY

pytestmark = [pytest.mark.matrix, pytest.mark.xdist_group("hosts")]  # two minutes
STEPS = 60
SETS = "precision=fp64", f"train.steps={STEPS}"
TIMEOUT = 10
"""Seconds of parallel.timeout."""


@pytest.fixture(scope="module")
def hosts():
    try:
        two = Hosts()
    except (NoHosts, OSError) as error:
        pytest.skip(f"NOT TESTED: this machine permits no network namespaces ({error})")
    yield two
    two.close()


@pytest.fixture(scope="module")
def straight(small_job, tmp_path_factory):
    """The run of one process that nothing interrupts."""
    folder = tmp_path_factory.mktemp("straight")
    run.train([str(small_job)], [f"run.dir={folder}", "run.name=run", *SETS])
    return folder / "run"


def training(small_job, tmp_path):
    """Command line of a rank."""
    sets = *SETS, f"run.dir={tmp_path}", "run.name=run", "parallel.replicate=2", f"parallel.timeout={TIMEOUT}"
    return [*HEADWAY, "train", str(small_job), *(part for each in sets for part in ("--set", each))]


def start_ranks(hosts, command, tmp_path):
    """A rank on each host, told who it is by variables."""
    ranks = []
    for rank in (0, 1):
        who = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29500"}
        ranks.append(hosts.start(rank, command, who, tmp_path / f"said{rank}"))
    return ranks


def codes(processes, tmp_path):
    """Exit codes, or what was said if a process does not end."""
    try:
        return [process.wait(90) for process in processes]
    finally:
        for path in sorted(tmp_path.glob("said*")):
            print(path.name, path.read_text())


def used(folder):
    """What a run's ledger says of its steps."""
    return [
        (row["step"], row["rows"], row["draws"], row["digest"])
        for row in read_metrics(folder / "ledger.jsonl")
    ]


def same_curve(folder, straight):
    losses, wanted = ([row["loss"] for row in read_metrics(each)] for each in (folder, straight))
    assert losses == pytest.approx(wanted, rel=1e-11)  # fp64: two ranks add in another order
    assert used(folder) == used(straight)
    show(str(folder), open_data=True)


def test_torchrun_on_two_hosts_draws_the_curve_of_one(hosts, straight, small_job, tmp_path):
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--no-python"]
    agent += ["--rdzv-backend=c10d", f"--rdzv-endpoint={NAMES[0]}:29400"]
    command = [*agent, *training(small_job, tmp_path)]
    shared = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    agents = [hosts.start(host, command, shared, tmp_path / f"said{host}") for host in (0, 1)]
    assert codes(agents, tmp_path) == [0, 0]
    same_curve(tmp_path / "run", straight)


def test_a_cut_link_is_named_and_the_mended_run_goes_on(hosts, straight, small_job, tmp_path):
    command = training(small_job, tmp_path)
    ranks = start_ranks(hosts, command, tmp_path)
    while len(read_metrics(tmp_path / "run" / "metrics.jsonl")) < 7:
        assert [rank.poll() for rank in ranks] == [None, None], codes(ranks, tmp_path)
        time.sleep(0.02)
    hosts.link(1, "down")
    assert codes(ranks, tmp_path) == [70, 70]
    done = len(read_metrics(tmp_path / "run"))
    assert 7 <= done < STEPS
    for rank, other in ((0, 1), (1, 0)):
        said = (tmp_path / f"said{rank}").read_text()
        assert (
            f"headway (rank {rank}): rank {rank} on host {NAMES[rank]}, step {done + 1}: a collective" in said
        )
        assert f"host {NAMES[other]} (rank {other}) cannot be reached at {ADDRESSES[other]}: " in said
        assert "Traceback" not in said
    hosts.link(1, "up")
    assert codes(start_ranks(hosts, command, tmp_path), tmp_path) == [0, 0]
    assert "goes on from" in (tmp_path / "said0").read_text()
    same_curve(tmp_path / "run", straight)


def test_a_master_behind_a_cut_link_is_named(hosts, small_job, tmp_path):
    hosts.link(1, "down")
    try:
        command = [*training(small_job, tmp_path), "--set", "parallel.start_timeout=5"]
        assert codes(start_ranks(hosts, command, tmp_path), tmp_path) == [70, 70]
    finally:
        hosts.link(1, "up")
    said = [(tmp_path / f"said{rank}").read_text() for rank in (0, 1)]
    assert "rank 1 of 2 did not come within parallel.start_timeout. There are: hosta (rank 0)" in said[0]
    assert f"rank 1 on host hostb cannot reach the master at {ADDRESSES[0]}:29500" in said[1]
