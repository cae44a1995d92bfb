"""A pool of worker processes that run functions of the tests as the ranks of a group: of gloo, or of NCCL on one GPU.

Ranks are forks of a process that has imported what they need (`nursery`), and serve all calls of a test session. Each
call makes a process group of its own size and ends it afterwards, so that no case sees another's meshes:

    def body(rank, world, text):          # at the top level of a test module without relative imports
        ...collectives...

    def test_it(pool):
        answers = pool(body, ranks=3, text="hello")         # answers[rank]

If ranks raise, their tracebacks come back, the first to fail first; a rank that dies or hangs is named, and
replaced at the next call.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from headway.tests.parallel.nursery import Nursery

SIZE = 8
"""Ranks at most."""

NATIVE = Nursery(
    "headway.tests.parallel.pool", "headway.parallel.engines.native", "headway.parallel.pipeline.run"
)


class RankError(AssertionError):
    """A rank failed; the text is its traceback."""


class Pool:
    """Worker processes, started when they are first needed and again when they died or hung.

    With `nccl` all share the first GPU. NCCL refuses two ranks of a host on one device, so each says that it is a host
    of its own, and they meet over the loopback: slowly, but through the same calls as on a cluster.
    """

    def __init__(self, size: int = SIZE, backend: str = "gloo", nursery: Nursery = NATIVE) -> None:
        self.size, self.backend, self.nursery = size, backend, nursery
        self._workers: dict[int, tuple[int, Connection]] = {}
        self._store: Any = None
        self._calls = 0

    def __call__(self, function: Callable[..., Any], ranks: int, timeout: float = 120, **kwargs: Any) -> Any:
        """Run `function(rank, world, **kwargs)` on `ranks` workers; returns what each returned, by rank.

        `function` stands at the top level of its module; arguments and results are picklable.

        Raises:
            RankError: with the tracebacks of ranks that raised, and the names of those that died or hang.
        """
        if ranks > self.size:
            raise ValueError(f"{ranks} ranks asked of a pool of {self.size}")
        for rank in set(range(ranks)) - self._workers.keys():
            self._workers[rank] = self._start(rank)
        self._calls += 1
        path = sys.modules[function.__module__].__file__
        for rank in range(ranks):
            self._workers[rank][1].send((str(path), function.__name__, rank, ranks, self._calls, kwargs))
        return self._gather(ranks, timeout)

    def close(self) -> None:
        """End all workers."""
        for rank in list(self._workers):
            self._end(rank)

    def _start(self, rank: int) -> tuple[int, Connection]:
        if self._store is None:
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ours, theirs = multiprocessing.Pipe()
        with theirs:
            number = self.nursery.start(theirs, rank=rank, port=self._store.port, backend=self.backend)
        return number, ours

    def _end(self, rank: int) -> int:
        """Its exit code."""
        number, pipe = self._workers.pop(rank)
        pipe.close()
        return self.nursery.end(number)

    def _gather(self, ranks: int, timeout: float) -> list[Any]:
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while waiting := [rank for rank in range(ranks) if rank not in answers | failures]:
            pipes = [self._workers[rank][1] for rank in waiting]
            ready = wait(pipes, max(0.0, deadline - time.monotonic()))
            for rank, pipe in zip(waiting, pipes, strict=True):
                if pipe in ready:
                    good, answer = self._answer(rank)
                    (answers if good else failures)[rank] = answer
                    if not good:  # the others see it too, or hang in a collective and are not waited for
                        deadline = min(deadline, time.monotonic() + 5)
            if not ready:
                for rank in waiting:
                    self._end(rank)
                    failures[rank] = f"no answer within {timeout:g} s, or 5 s after the first failure"
        if failures:
            if self.backend == "nccl":
                self.close()  # NCCL may not let go of a broken group
            raise RankError("\n".join(f"rank {rank}: {text}" for rank, text in failures.items()))
        return [answers[rank] for rank in range(ranks)]

    def _answer(self, rank: int) -> tuple[bool, Any]:
        try:
            return self._workers[rank][1].recv()
        except (EOFError, OSError):
            return False, f"died with exit code {self._end(rank)}"


def live(pipe: Connection, rank: int, port: int, backend: str) -> None:
    """A worker's life: take a call, be a rank of its group, answer."""
    os.environ |= {"NCCL_HOSTID": f"rank{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays: looking for garbage in it would take a quarter of a second
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    while True:
        try:
            path, name, rank, world, call, kwargs = pipe.recv()
        except EOFError:
            return  # the tests are over
        try:
            function = getattr(_module(path), name)
            dist.init_process_group(
                backend, store=dist.PrefixStore(f"call{call}", store), rank=rank, world_size=world
            )
            answer = (True, function(rank, world, **kwargs))
        except BaseException:
            answer = (False, traceback.format_exc())
        finally:
            with contextlib.suppress(Exception):
                dist.destroy_process_group()
            _forget_meshes()
        pipe.send(answer)


def _forget_meshes() -> None:
    """DTensor remembers results by mesh. Meshes of two calls are equal though their groups are not the same, and what
    keeps a mesh keeps gloo's threads, which wake hundreds of times a second."""
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import _collective_utils, _redistribute, debug

        debug._clear_sharding_prop_cache()
        _redistribute._gen_transform_infos.cache_clear()
        _redistribute.clear_redistribute_planner_cache()
        _collective_utils.MeshTopoInfo.build_from_mesh.cache_clear()
        gc.collect()


def _module(path: str) -> Any:
    """The test module in a file, whatever name pytest has given it."""
    name = f"ranks_{Path(path).stem}_{abs(hash(path))}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec
        assert spec.loader
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Ranks of a gloo group: `pool(function, ranks=3, **kwargs)`; see this module."""
    ranks = Pool()
    yield ranks
    ranks.close()
