"""A training step with experts beside the dense model of equal active parameters, interleaved.

    python tests/benchmarks/bench_moe.py [--rounds 5] [--batch 16] [--layers 2] [--precisions fp32 bf16]

A step is the forward and backward of GPT's blocks and head, with attention and a feed-forward layer that is
either dense or has experts whose widths, times the experts of a token, are the dense width. Prints median times of
each and the ratio; 1.5 is the bound. Experts multiply the bytes of weights and gradients that a step touches, so the
ratio falls as a batch grows.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from headway.kernels.cross_entropy import linear_cross_entropy
from headway.pretrain import config
from headway.pretrain.models.transformer import Block, Context

HIDDEN, HEADS, VOCAB, LENGTH = 512, 8, 16384, 512
SHAPES = ((8, 2), (64, 2), (64, 8))  # experts, and experts of a token


def build(layers: int, experts: int, top_k: int) -> nn.ModuleDict:
    """A model with random weights; `experts` of 0 is dense."""
    settings = config.Experts(count=experts, top_k=top_k, ffn=4 * HIDDEN // top_k)
    model = config.Model(hidden=HIDDEN, heads=HEADS, experts=settings)
    parts = nn.ModuleDict({"layers": nn.ModuleList(Block(model) for _ in range(layers))})
    parts["head"] = nn.Linear(HIDDEN, VOCAB, bias=False)
    for p in parts.parameters():
        nn.init.normal_(p, std=0.02)
    return parts


def stepper(parts: nn.ModuleDict, x_BSE: Tensor, labels: Tensor, precision: str) -> Callable[[], None]:
    def step() -> None:
        parts.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            h_BSE, extra = x_BSE, x_BSE.new_zeros(())
            for layer in parts["layers"]:
                h_BSE, side = layer(h_BSE, Context())
                if side:
                    extra = extra + 0.01 * side["balance"].sum() + 0.001 * side["router_z"].sum()
            loss = linear_cross_entropy(h_BSE.flatten(0, 1), parts["head"].weight, labels)[0]
        (loss / len(labels) + extra).backward()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each")
    parser.add_argument("--batch", type=int, default=16, help="rows of 512 tokens")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    args = parser.parse_args()
    draw = torch.Generator().manual_seed(0)
    x_BSE = torch.randn(args.batch, LENGTH, HIDDEN, generator=draw)
    labels = torch.randint(0, VOCAB, (args.batch * LENGTH,), generator=draw)
    for precision in args.precisions:
        for experts, top_k in SHAPES:
            models = build(args.layers, 0, 1), build(args.layers, experts, top_k)
            steps = [stepper(model, x_BSE, labels, precision) for model in models]
            times: list[list[float]] = [[], []]
            for step in steps:
                step()
            for _ in range(args.rounds):
                for step, taken in zip(steps, times, strict=True):
                    start = time.perf_counter()
                    step()
                    taken.append(time.perf_counter() - start)
            dense, sparse = map(statistics.median, times)
            print(
                f"step {precision}: {experts} experts, top {top_k}: {sparse:.2f} s, dense {dense:.2f} s, "
                f"ratio {sparse / dense:.2f}x",
                flush=True,
            )


if __name__ == "__main__":
    main()
