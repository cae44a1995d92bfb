"""The proof of an engine: eight steps at a layout, beside the native engine in one process, in the same precision.

    prove_engine(pool, ["gpt", "t5"], {"engine": "deepspeed", "shard": 2})

In fp32 losses are within 1e-5 and gradient norms within 2e-4, relative (as the native engine's own layouts are); every
parameter and moment is within 1e-4 of a number of its size or of 1. Adam's epsilon is 1e-6: gradients that are zero
but for rounding (those of biases of keys, which softmax does not see) would else be divided by themselves, and move by
whole steps at random.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from headway.parallel.checkpoint.layout import held
from headway.parallel.checkpoint.load import load
from headway.pretrain.errors import NonFiniteError
from headway.tests.parallel.family_cases import Tree, merged
from headway.tests.parallel.proof import (
    Curve,
    Running,
    alone,
    curves,
    hold_together,
    note,
    ranks_of,
    whole_of,
)

STEPS = 8
PLAIN: Tree = {
    "model": {"heads": 4, "layers": 2, "unique_layers": None},
    "optimizer": {"name": "adamw", "eps": 1e-6},
}
DEEP: Tree = merged(PLAIN, {"model": {"layers": 4}})
"""Blocks for four stages."""


class Bound(NamedTuple):
    """Largest relative deviation of a loss, of a gradient norm; of a number of the state, relative to it or to 1."""

    loss: float
    norm: float
    state: float | None


BOUNDS = {
    "fp32": Bound(1e-5, 2e-4, 1e-4),
    # Weights are rounded to 8 bits of mantissa where the native engine has autocast: 2^-9 relative a product.
    "bf16": Bound(1e-2, 2e-1, None),
    "fp16": Bound(1e-3, 5e-2, None),  # 11 bits; routers choose other experts now and then
}


def prove_engine(
    pool: Any,
    names: list[str],
    parallel: Tree,
    more: Tree | None = None,
    steps: int = STEPS,
    precision: str = "fp32",
) -> None:
    """Assert that every rank of an engine's layout draws the curves of the native engine in one process."""
    settings = merged(PLAIN, more or {})
    found = pool(
        curves,
        ranks=ranks_of(parallel),
        timeout=600,
        parallel={"shard": 1} | parallel,
        names=names,
        steps=steps,
        precision=precision,
        more=settings,
    )
    for name in names:
        expected = alone(name, settings, steps, precision)
        each = [Curve(*rank[name]) for rank in found]
        note(precision, _told(parallel), name, each, expected)
        for one in each:
            compare(name, one, expected, BOUNDS[precision])
        hold_together(each, expected)


def compare(name: str, found: Curve, expected: Curve, bound: Bound) -> None:
    """Assert that a curve is another, and of what a rank holds of the state that it is right."""
    np.testing.assert_allclose(found.losses, expected.losses, rtol=bound.loss, err_msg=name)
    np.testing.assert_allclose(found.norms, expected.norms, rtol=bound.norm, err_msg=name)
    for ours, theirs in zip(found.metrics, expected.metrics, strict=True):
        assert ours.keys() == theirs.keys(), name
    if bound.state is None:
        return
    whole = whole_of(expected)
    for key, start, stop, values in found.parts:
        theirs = whole[key][tuple(map(slice, start, stop))]
        np.testing.assert_allclose(
            values, theirs, rtol=bound.state, atol=bound.state, err_msg=f"{name} {key}"
        )


def second_half(
    rank: int, world: int, name: str, parallel: Tree, folder: str, more: Tree, first: int, steps: int = STEPS
) -> tuple[Any, ...]:
    """The fields of the curve from step `first` on, from the checkpoint of that step in `folder`."""
    running = Running(name, rank, world, {"shard": 1} | parallel, more, steps, precision="fp32")
    state = running.engine.state()
    with torch.no_grad():
        for part in held(state.tensors):
            part.view.fill_(-7)
    state.numbers = load(Path(folder) / f"step_{first:08}", state)
    running.engine.load(state)
    results = [running.step(step) for step in range(first, steps)]
    metrics = [{key: np.array(value) for key, value in r.metrics.items()} for r in results]
    return [r.loss for r in results], [r.grad_norm for r in results], metrics, running.parts()


def diverging(rank: int, world: int, parallel: Tree, more: Tree) -> list[float]:
    """DeepSpeed: a step whose loss is not finite must leave everything as it was; losses of the three after it."""
    running = Running("gpt", rank, world, parallel, more, 4, precision="fp32")
    running.step(0)
    before = running.parts()
    flats = running.engine.flats
    weight = flats.weight("model.embed.tokens.weight")
    kept = weight.clone()
    weight.fill_(torch.inf)
    flats.refresh()
    with pytest.raises(NonFiniteError):
        running.step(1)
    weight.copy_(kept)
    flats.refresh()
    flats.moved()  # what is on disk is read anew
    for (name, *_, was), (_, *_, now) in zip(before, running.parts(), strict=True):
        np.testing.assert_array_equal(was, now, err_msg=name)
    return [running.step(step).loss for step in range(1, 4)]


def _told(parallel: Tree) -> Tree:
    """A layout as it is told at the end of the tests: settings of an engine's section beside its axes."""
    flat = {k: v for k, v in parallel.items() if not isinstance(v, dict)}
    return flat | {
        k: v for section in parallel.values() if isinstance(section, dict) for k, v in section.items()
    }
