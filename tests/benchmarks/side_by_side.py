"""Training steps of two implementations of one model: same weights, batch, precision and optimizer, in turns.

A step is forward, backward, clipping to norm 1 and fused AdamW. Before anything is timed, the losses of both must
agree without dropout in fp32, so that the same thing is timed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from headway.parallel.apply import compile_blocks
from headway.pretrain.engine import Batch
from headway.pretrain.hf.folder import open_folder
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.layers import Noise
from headway.pretrain.objectives import Objective, build_objective

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
MODES, PRECISIONS = ("eager", "compiled"), ("fp32", "bf16")


class Pair(NamedTuple):
    """Both implementations of one model.

    Attributes:
        ours: objective, called with `batch`.
        theirs: module, trained by `their_loss`, the mean over what `ours` counts.
        rival: whose `theirs` is.
        dropout: whether both drop.
    """

    ours: Objective
    batch: Batch
    theirs: nn.Module
    their_loss: Callable[[nn.Module], Tensor]
    rival: str = "transformers"
    dropout: bool = False

    def our_loss(self, step: int | None) -> Tensor:
        """Mean loss, with the dropout of a step or without."""
        slots = torch.arange(len(self.batch["labels"]))
        noise = Noise.at(0, step, slots) if step is not None and self.dropout else None
        terms = self.ours(self.batch, noise).terms
        return terms[self.ours.scored] / (self.batch["labels"] != -100).sum()

    def check(self) -> None:
        """Assert that both compute the same: fp32 sums in two orders differ by far less than 1e-4."""
        self.theirs.eval()
        with torch.no_grad():
            a, b = self.our_loss(None).item(), self.their_loss(self.theirs).item()
        assert abs(a - b) < 1e-4, f"the losses differ: ours {a}, {self.rival} {b}"
        self.theirs.train()

    def compile(self) -> None:
        compile_blocks(self.ours)
        self.theirs.compile()


def from_transformers(theirs: nn.Module, inputs: Inputs) -> Objective:
    """Our objective with shape and weights of a model of transformers, as `start_from` would load it."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with tempfile.TemporaryDirectory() as place:
        theirs.save_pretrained(place)  # type: ignore[operator]
        folder = open_folder(Path(place))
        ours = build_objective(folder.job, inputs)
        fill(ours, dict(folder.tensors()))
    return ours


def fill(ours: Objective, weights: dict[str, Tensor]) -> None:
    """Load weights; every parameter must get one."""
    missing, unknown = ours.load_state_dict(weights, strict=False)
    assert not missing, f"no weights for {missing}"
    assert not unknown, f"no place for {unknown}"


def stepper(module: nn.Module, loss_of: Callable[[int], Tensor], precision: str) -> Callable[[int], float]:
    """A function that takes step number n and returns its loss."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-4, fused=True)
    device = next(module.parameters()).device.type

    def step(number: int) -> float:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(number)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def race(pair: Pair, mode: str, precision: str, rounds: int, clock: str = "wall") -> str:
    """Median times of both and their ratio, as a line of a table."""
    torch.compiler.reset()
    pair.check()
    if mode == "compiled":
        pair.compile()
    now = CLOCKS[clock]
    steps = (
        stepper(pair.ours, pair.our_loss, precision),
        stepper(pair.theirs, lambda _: pair.their_loss(pair.theirs), precision),
    )
    first = [step(number) for number in range(2) for step in steps][:2]  # compiles and warms up
    times: list[list[float]] = [[], []]
    for number in range(2, 2 + rounds):
        for which in (0, 1) if number % 2 else (1, 0):  # neither always follows the other
            start = now()
            steps[which](number)
            times[which].append(now() - start)
    ours, theirs = map(statistics.median, times)
    return (
        f"{mode:8} {precision}: ours {ours * 1e3:7.1f} ms, {pair.rival:12} {theirs * 1e3:7.1f} ms, "
        f"ratio {theirs / ours:.2f}x; first losses {first[0]:.5f} {first[1]:.5f}"
    )


def arguments(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """What all benchmarks of steps can be asked."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="measured steps of each")
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument(
        "--clock", default="wall", choices=CLOCKS, help="cpu: time of this process, where others run beside"
    )
    return parser
