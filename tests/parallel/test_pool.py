"""The pool of ranks: it answers by rank, at any size, and survives a rank that raises, dies or hangs."""

import os
import signal

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh


def reduce(rank, world, base):
    total = torch.tensor([float(rank + base)])
    dist.all_reduce(total)
    mesh = init_device_mesh("cpu", (world,))
    return rank, mesh.size(), total.item()


def fail(rank, world):
    if rank == 1:
        raise ValueError("the second rank is unwell")
    dist.barrier()  # the others wait for it


def die(rank, world):
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hang(rank, world):
    signal.pause()


def test_sizes_share_one_pool(pool):
    for ranks in (2, 4, 1, 3):
        expected = sum(range(ranks)) + 10.0 * ranks
        assert pool(reduce, ranks=ranks, base=10) == [(rank, ranks, expected) for rank in range(ranks)]


def test_failures_are_told_and_survived(pool):
    own = type(pool)(2)  # its workers end here; the shared ones stay
    try:
        with pytest.raises(AssertionError, match=r"(?s)rank 1: .*ValueError: the second rank is unwell"):
            own(fail, ranks=2)
        with pytest.raises(AssertionError, match="rank 0: died with exit code -9"):
            own(die, ranks=2)
        with pytest.raises(AssertionError, match=r"rank 0: no answer within 0\.01 s"):
            own(hang, ranks=1, timeout=0.01)
        assert own(reduce, ranks=2, base=0)[1] == (1, 2, 1.0)
    finally:
        own.close()
