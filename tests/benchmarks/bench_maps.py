"""Distillation of attention maps against the usual way (softmax, PyTorch's loss, autograd): seconds and peak memory.

    python tests/benchmarks/bench_maps.py [--lengths 512 1024 2048 4096 8192] [--losses kl]

One sample, 12 heads of 64 of both models, fp32, 2 threads; the loss with its gradients by the student's queries and
keys. Seconds are medians of rounds in turns; memory is the growth of the process at its peak in one round, in a process
of its own. The usual way is left out above 4,096: its maps take tens of GiB. Wanted: 4 times as fast from 2,048 on, a
tenth of the memory at 4,096, and memory that grows with the length (log-log slope at most 1.1).
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.map_distillation import map_distillation_loss
from headway.launch.timing import begin, peak_since

HEADS, DIM, LONGEST = 12, 64, 4096
CPU = torch.device("cpu")
Compute = Callable[[list[Tensor], str], Tensor]


def ours(inputs: list[Tensor], loss: str) -> Tensor:
    return map_distillation_loss(*inputs, loss=loss)


def usual(inputs: list[Tensor], loss: str) -> Tensor:
    """What a training loop does with maps, or scores, that models return."""
    t, s = (q @ k.mT / math.sqrt(DIM) for q, k in (inputs[:2], inputs[2:]))
    rows = t.shape[:3].numel()
    if loss == "scores":
        return F.mse_loss(s, t)
    p = torch.softmax(t, -1)
    if loss == "mse":
        return F.mse_loss(torch.softmax(s, -1), p)
    log_q = torch.log_softmax(s, -1)
    if loss == "kl":
        return F.kl_div(log_q, p, reduction="sum") / rows
    log_p = torch.log_softmax(t, -1)
    if loss == "reverse_kl":
        return F.kl_div(log_p, log_q, reduction="sum", log_target=True) / rows
    m = ((p + log_q.exp()) / 2).log()
    both = (F.kl_div(m, x, reduction="sum", log_target=True) for x in (log_p, log_q))
    return sum(both, torch.zeros(())) / (2 * rows)


WAYS: dict[str, Compute] = {"ours": ours, "usual": usual}


def operands(length: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, HEADS, length, DIM).requires_grad_(i > 1) for i in range(4)]


def step(way: str, inputs: list[Tensor], loss: str) -> float:
    """Loss and gradients, once; returns the loss."""
    value = WAYS[way](inputs, loss)
    torch.autograd.grad(value, inputs[2:])
    return value.item()


def seconds(length: int, loss: str, rounds: int) -> dict[str, float]:
    """Medians of both ways, in turns; a round more warms up. Both must give the same loss first."""
    inputs, ways = operands(length), [way for way in WAYS if way == "ours" or length <= LONGEST]
    values = [step(way, inputs, loss) for way in ways]
    assert all(math.isclose(x, values[0], rel_tol=1e-4) for x in values), values
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in ways[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            step(way, inputs, loss)
            times[way].append(time.perf_counter() - start)
    return {way: statistics.median(x) for way, x in times.items()}


def memory(length: int, loss: str, way: str) -> int:
    """Bytes at the peak of a step, beside its operands, in a new process."""
    found = subprocess.run(
        [sys.executable, __file__, "--peak", way, "--lengths", str(length), "--losses", loss],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return int(found.stdout.split()[-1])


def peak_of_step(length: int, loss: str, way: str) -> int:
    step(way, operands(64), loss)  # loads libraries
    inputs = operands(length)
    before = begin(CPU)
    step(way, inputs, loss)
    return peak_since(CPU) - before


def slope(points: dict[int, float]) -> float:
    """Of the logarithms, fitted by least squares."""
    if len(points) < 2:
        return math.nan
    return statistics.linear_regression(
        list(map(math.log, points)), list(map(math.log, points.values()))
    ).slope


def table(lengths: list[int], loss: str, rounds: int) -> None:
    found: dict[tuple[str, str], dict[int, float]] = {
        (way, kind): {} for way in WAYS for kind in ("seconds", "memory")
    }
    for length in lengths:
        for way, median in seconds(length, loss, rounds).items():
            found[way, "seconds"][length] = median
            found[way, "memory"][length] = memory(length, loss, way)
        line = f"{loss:10} {length:5}"
        for kind, unit, name in (("seconds", 1e-3, "ms"), ("memory", 2**20, "MiB")):
            mine, theirs = (found[way, kind].get(length, math.nan) for way in WAYS)
            line += (
                f"   {kind} ours {mine / unit:8.1f} {name}, usual {theirs / unit:8.1f}, {theirs / mine:5.1f}x"
            )
        print(line, flush=True)
    slopes = (f"{way} {kind} {slope(points):.2f}" for (way, kind), points in found.items())
    print(f"{loss:10} log-log slopes: {', '.join(slopes)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--losses", nargs="+", default=["kl"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", choices=WAYS, help="print the peak memory of this way's step, and no more")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.peak:
        print(peak_of_step(asked.lengths[0], asked.losses[0], asked.peak))
        return
    for loss in asked.losses:
        table(asked.lengths, loss, asked.rounds)


if __name__ == "__main__":
    main()
