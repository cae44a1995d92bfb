"""What the native engine costs over a plain loop: the same model, batch, precision and optimizer, interleaved.

    python tests/benchmarks/bench_engine.py [--rounds 40] [--modes compiled eager] [--precisions fp32 bf16] [--cuda]

The plain loop is what a script would have: forward, backward, clipping to norm 1, fused AdamW. The engine counts what
it divides by, cuts micro-batches, follows schedules and looks for what is not finite. Prints the ratio of the medians,
engine over loop; 1.02 is the limit. On a GPU the model is GPT-2's smallest.
"""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import torch
from side_by_side import arguments, stepper

from headway.parallel import mesh
from headway.parallel.apply import compile_blocks
from headway.parallel.engines.native import NativeEngine
from headway.pretrain.config import Job
from headway.pretrain.engine import Batch
from headway.pretrain.models.init import initialise
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.layers import Noise
from headway.pretrain.objectives import Objective, build_objective

SEED = 1234


class Size(NamedTuple):
    device: str
    vocab: int
    layers: int
    hidden: int
    heads: int
    rows: int
    length: int


SMALL, GPT2 = Size("cpu", 4096, 4, 256, 4, 8, 256), Size("cuda", 50304, 12, 768, 12, 16, 1024)


def job_of(size: Size, precision: str) -> Job:
    return Job.model_validate(
        {
            "model": {"layers": size.layers, "hidden": size.hidden, "heads": size.heads},
            "data": {"seq_len": size.length, "tokenizer": {"kind": "bytes"}},
            "optimizer": {"lr": 3e-4, "betas": [0.9, 0.999], "weight_decay": 0.01, "clip": 1.0},
            "schedule": {"warmup": 2},
            "train": {"steps": 1000, "global_batch": size.rows, "seed": SEED},
            "precision": precision,
        }
    )


def batch_of(size: Size) -> Batch:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(0, size.vocab, (size.rows, size.length + 1), generator=draw)
    numbers = torch.arange(size.rows)
    batch = {
        "tokens": rows[:, :-1].contiguous(),
        "labels": rows[:, 1:].contiguous(),
        "slot": numbers,
        "sample": numbers,
    }
    return {key: value.to(size.device) for key, value in batch.items()}


def race(size: Size, mode: str, precision: str, rounds: int) -> str:
    """Median times of both and their ratio, as a line of a table."""
    torch.compiler.reset()
    job, batch, inputs = job_of(size, precision), batch_of(size), Inputs(size.vocab, size.length)
    world = mesh.start(job, mesh.Layout(), 0, 1, 0, torch.device(size.device, 0), "gloo")
    made = build_objective(job, inputs, device="meta")
    engine = NativeEngine(job, made, world, precision=precision, compiled=mode == "compiled")
    plain: Objective = build_objective(job, inputs, device=size.device)
    initialise(plain, job.model, SEED)
    if mode == "compiled":
        compile_blocks(plain)

    def loss_of(number: int) -> torch.Tensor:
        total = plain(batch, Noise.at(SEED, number, batch["slot"])).terms["tokens"]
        return total / batch["labels"].numel()

    steps = (lambda n: engine.train_step(batch, n).loss, stepper(plain, loss_of, precision))
    first = [[step(number) for step in steps] for number in range(3)]  # compiles and warms up
    assert first[0][0] == first[0][1], f"not the same model: {first[0]}"
    times: list[list[float]] = [[], []]
    for number in range(3, 3 + rounds):
        for which in (0, 1) if number % 2 else (1, 0):  # neither always follows the other
            start = time.perf_counter()
            steps[which](number)
            times[which].append(time.perf_counter() - start)
    ours, theirs = map(statistics.median, times)
    pairs = statistics.median(a / b for a, b in zip(*times, strict=True))
    return (
        f"{mode:8} {precision}: engine {ours * 1e3:6.1f} ms, loop {theirs * 1e3:6.1f} ms, ratio {ours / theirs:.3f} "
        f"(median of the pairs' ratios {pairs:.3f})"
    )


def main() -> None:
    parser = arguments(__doc__, rounds=40)
    parser.add_argument("--cuda", action="store_true", help="on a GPU")
    args = parser.parse_args()
    size = GPT2 if args.cuda else SMALL
    print(
        f"a step of {size.rows * size.length} tokens at world 1, medians of {args.rounds} rounds; limit 1.02"
    )
    for mode in args.modes:
        for precision in args.precisions:
            print(" ", race(size, mode, precision, args.rounds), flush=True)


if __name__ == "__main__":
    main()
