"""How long a step stalls in `Checkpointer.save`, against a synchronous `torch.save` of the same state.

One process, 200 MB of fp32 weights and moments, all on one disk, interleaved, medians. Buffers are warm: the
first save of each, which allocates, is not counted (it is printed). Each background save is awaited outside
the timed part, as the hundred steps between two checkpoints would. `deferred`, which the training loop uses,
copies while the next forward and backward run and stalls for what is left before the update; the time of that
compute with and without the copy beside it is printed too.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from headway.parallel.checkpoint.load import load
from headway.parallel.checkpoint.save import Checkpointer
from headway.pretrain.engine import State

ROUNDS = 7
AIM = 0.15


def state() -> State:
    """Shapes of a small transformer: 17 layers of 1,024 x 1,024 matrices, each with two moments."""
    names = [f"{kind}layers.{i}.weight" for i in range(17) for kind in ("", "exp_avg.", "exp_avg_sq.")]
    return State({name: torch.randn(1024, 1024) for name in names}, {"step": 1})


def timed(action: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def backward() -> None:
    """Products worth a forward and backward of 17M weights over 1,024 tokens: what runs while values are copied."""
    a, b = torch.ones(1024, 1024), torch.ones(1024, 1024)
    for _ in range(17 * 3):
        torch.mm(a, b)


def main() -> None:
    """Print each way's median and the ratios."""
    live = state()
    size = sum(tensor.nbytes for tensor in live.tensors.values())
    times: dict[str, list[float]] = {}
    with (
        tempfile.TemporaryDirectory() as base,
        Checkpointer(Path(base) / "checkpoints", keep_last=1) as saver,
    ):
        theirs = Path(base) / "state.pt"

        def plain() -> None:
            torch.save(live.tensors, theirs)

        def durable() -> None:
            torch.save(live.tensors, theirs)
            with open(theirs, "rb") as file:
                os.fsync(file.fileno())

        def fresh(action: Callable[[], object]) -> float:
            theirs.unlink(missing_ok=True)  # neither side pays for freeing an old file
            return timed(action)

        for step in range(ROUNDS + 1):
            stall = timed(lambda step=step: saver.save(2 * step, live))
            rest = timed(saver.wait)
            deferred = timed(lambda step=step: saver.save(2 * step + 1, live, deferred=True))
            work = timed(backward)
            deferred += timed(saver.copied)
            saver.wait()
            found = {
                "save, background: stall": stall,
                "save, deferred: stall": deferred,
                "save, background: until published": stall + rest,
                "compute of a step, while copying": work,
                "compute of a step, alone": timed(backward),
                "torch.save": fresh(plain),
                "torch.save and fsync": fresh(durable),
                "load, verified": timed(lambda: load(saver.published[-1], live)),
                "load, not verified": timed(lambda: load(saver.published[-1], live, verify=False)),
                "torch.load": timed(lambda: torch.load(theirs)),
            }
            for name, seconds in found.items():
                times.setdefault(name, []).append(seconds)
        if saver.problems:
            raise saver.problems[0]
    threads = torch.get_num_threads()
    print(f"{size / 1e6:.0f} MB in {len(live.tensors)} tensors, {threads} threads, {ROUNDS} rounds")
    median = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    for name, seconds in times.items():
        best, first = min(seconds[1:]) * 1e3, seconds[0] * 1e3
        print(f"{name:36s} median {median[name] * 1e3:7.1f} ms   best {best:7.1f}   first {first:7.1f}")
    for name in ("torch.save", "torch.save and fsync"):
        for way in ("background", "deferred"):
            ratio = median[f"save, {way}: stall"] / median[name]
            print(f"stall, {way:10s} / {name:24s} {ratio:6.1%}  (aim: at most {AIM:.0%})")


if __name__ == "__main__":
    main()
