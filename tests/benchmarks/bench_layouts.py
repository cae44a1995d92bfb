"""Two processes of a thread each beside one process of two threads: the same global batch, interleaved.

    python tests/benchmarks/bench_layouts.py [--rounds 8] [--layouts tensor context ...]

Prints for each layout the ratio of the medians (above 1: two processes are faster) and the share of a step in which a
collective or message is under way or waited for, on the rank that has most, from torch's profiler. The network is
loopback, and both cores are shared by arithmetic and by what carries the messages.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from bench_engine import LENGTH, ROWS, VOCAB, batch_of, job_of
from torch.profiler import ProfilerActivity, profile

from headway.parallel import mesh
from headway.parallel.engines.native import NativeEngine
from headway.pretrain.engine import Batch
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.objectives import build_objective

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor": 2},
    "tensor, no sequence": {"tensor": 2, "sequence": False},
    "replicate": {"replicate": 2, "shard": 1},
    "shard": {"shard": 2},
    "pipeline": {"pipeline": 2, "micro_batch": 2},
    "ring": {"context": 2},
    "ulysses": {"context": 2, "context_method": "ulysses"},
}
ALONE, TOGETHER = 2, 1
"""Threads of one process, and of each of two."""


def engine_of(parallel: dict[str, Any], rank: int, world: int) -> NativeEngine:
    job = job_of("fp32")
    job = job.model_copy(update={"parallel": type(job.parallel).model_validate({"shard": 1} | parallel)})
    layout = mesh.lay_out(job.parallel, world)
    here = mesh.start(job, layout, rank, world, rank, torch.device("cpu"), "gloo")
    objective = build_objective(job, Inputs(VOCAB, LENGTH), device="meta")
    return NativeEngine(job, objective, here, precision="fp32", compiled=False)


def rows_of(engine: NativeEngine, batch: Batch) -> Batch:
    """This rank's rows."""
    share = ROWS // engine.world.layout.data
    first = engine.world.data_rank * share
    return {name: value[first : first + share] for name, value in batch.items()}


def in_messages(engine: NativeEngine, batch: Batch, number: int) -> float:
    """Share of a step in which messages are under way or waited for."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        start = time.perf_counter()
        engine.train_step(batch, number)
        took = time.perf_counter() - start
    spans = sorted(
        (e.time_range.start, e.time_range.end)
        for e in found.events() or []
        if e.name.startswith(("gloo:", "c10d::", "_c10d_functional::"))
    )
    busy, until = 0.0, 0.0
    for begin, end in spans:  # their union
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return busy / 1e6 / took


def measure(rank: int, port: int, layout: str, rounds: int) -> None:
    """One of two processes; the first prints."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(TOGETHER)
    ours, whole = engine_of(LAYOUTS[layout], rank, 2), batch_of()
    alone = engine_of({}, 0, 1) if rank == 0 else None
    mine = rows_of(ours, whole)
    times: list[list[float]] = [[], []]
    losses = []
    for number in range(rounds + 2):
        dist.barrier()
        start = time.perf_counter()
        losses = [ours.train_step(mine, number).loss]
        dist.barrier()
        times[0].append(time.perf_counter() - start)
        if alone:
            torch.set_num_threads(ALONE)
            start = time.perf_counter()
            losses.append(alone.train_step(whole, number).loss)
            times[1].append(time.perf_counter() - start)
            torch.set_num_threads(TOGETHER)
    dist.barrier()
    share = torch.tensor(in_messages(ours, mine, rounds + 2))
    dist.all_reduce(share, dist.ReduceOp.MAX)
    if rank == 0:
        assert abs(losses[0] - losses[1]) < 1e-3, losses
        two, one = (statistics.median(each[2:]) for each in times)
        print(
            f"  {layout:20} two processes {two * 1e3:7.1f} ms, one {one * 1e3:7.1f} ms, ratio {one / two:.2f}; "
            f"messages {share:.0%} of a step",
            flush=True,
        )
    mesh.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8, help="measured steps of each")
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, choices=LAYOUTS)
    args = parser.parse_args()
    print(f"a step of {ROWS * LENGTH} tokens, fp32, eager, medians of {args.rounds} rounds")
    for i, layout in enumerate(args.layouts):
        torch.multiprocessing.spawn(measure, (29600 + i, layout, args.rounds), nprocs=2)


if __name__ == "__main__":
    main()
