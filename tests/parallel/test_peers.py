"""Ranks that do not come, that share a GPU, that end or hang: each is named."""

import errno
import os
import socket
import threading

import pytest
import torch.distributed as dist

from headway.parallel import peers
from headway.parallel.doors import probe
from headway.parallel.peers import Member, Peers, of_collective
from headway.parallel.roll import meet, refuse_shared_gpus
from headway.pretrain.errors import JobError, LostRanksError, StartError


@pytest.fixture
def master(monkeypatch):
    """A free port of the loopback to meet at."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return port


def together(ranks, size, timeout):
    """What `meet` gave or raised, by rank."""
    said = {}

    def one(rank):
        try:
            said[rank] = meet(rank, size, timeout)
        except Exception as error:
            said[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return said


def test_ranks_that_do_not_come_are_named_by_those_that_did(master):
    said = together([0, 3], 5, timeout=1)
    for rank in (0, 3):
        assert isinstance(said[rank], StartError)
        host = socket.gethostname()
        wanted = (
            f"ranks 1-2, 4 of 5 did not come within parallel.start_timeout. There are: {host} (ranks 0, 3)"
        )
        assert wanted in str(said[rank])


def test_a_master_that_cannot_be_reached_is_named(master):
    with pytest.raises(
        StartError, match=f"rank 1 on host .* cannot reach the master at 127.0.0.1:{master} within .*refused"
    ):
        meet(1, 2, 1)


def test_a_port_that_is_taken_is_named(master):
    with (
        socket.create_server(("0.0.0.0", master)),
        pytest.raises(StartError, match=f"store of ours at 127.0.0.1:{master} .*MASTER_PORT"),
    ):
        meet(0, 2, 1)


def test_all_come(master):
    said = together(range(3), 3, timeout=20)
    assert [said[rank].members for rank in range(3)] == [said[0].members] * 3
    assert said[1].lost().startswith("all other ranks answer")
    said[2]._door.close()
    assert said[1].lost().startswith(f"rank 2 on host {socket.gethostname()} ended")


def test_a_probe_tells_a_process_from_a_host_and_from_neither():
    """A host that does not answer is cut off in tests/launch/test_hosts.py."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        places = [("127.0.0.1", door.getsockname()[1]), ("127.0.0.1", 1), ("no.such.host.invalid", 1)]
        found = probe(places)
    assert found[:2] == [0, errno.ECONNREFUSED]
    assert found[2] != 0


def test_the_error_names_step_rank_and_host(monkeypatch):
    members = [
        Member("a", "a", "127.0.0.1", 1),
        Member("b", "b", "10.9.9.9", 5),
        Member("b", "b", "10.9.9.9", 6),
    ]
    monkeypatch.setattr(peers, "probe", lambda places: [errno.EHOSTUNREACH] * len(places))
    text = "[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 20000ms for recv operation to complete"
    with (
        pytest.raises(LostRanksError) as error,
        Peers(0, members, dist.HashStore(), socket.socket()).named(lambda: "step 7"),
    ):
        raise RuntimeError(text)
    assert str(error.value).startswith(
        "rank 0 on host a, step 7: a collective failed (Timed out waiting 20000ms for recv operation to complete): "
        f"host b (ranks 1-2) cannot be reached at 10.9.9.9: {os.strerror(errno.EHOSTUNREACH)}. "
    )


def test_other_errors_pass():
    assert of_collective(dist.DistBackendError("NCCL error"))
    assert not of_collective(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with (
        pytest.raises(RuntimeError, match=r"^shapes$"),
        Peers(0, [Member("a", "a", "", 1)], dist.HashStore(), socket.socket()).named(lambda: "step 7"),
    ):
        raise RuntimeError("shapes")


def test_a_gpu_that_two_ranks_share_is_refused():
    apart = [
        Member("a", "a", "", 1, "GPU-1"),
        Member("b", "b", "", 1, "GPU-1"),
        Member("a", "a", "", 2, "GPU-2"),
    ]
    refuse_shared_gpus(apart)
    refuse_shared_gpus([Member("a", "a", "", 1)] * 2)  # CPUs
    with pytest.raises(JobError, match=r"ranks 2 and 3 on host a have the same GPU \(GPU-2\)"):
        refuse_shared_gpus([*apart, Member("a", "a", "", 3, "GPU-2")])
