"""How tensors of one house become tensors of the other: names on both sides, and a change that has an inverse.

Every change moves numbers and computes none, so that there and back gives the same bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from headway.pretrain.errors import CheckpointError

Tensors = Sequence[Tensor]


class Change(NamedTuple):
    """Tensors of the left side of a link to those of its right side, and back.

    Attributes:
        there: Headway's tensors -> Hugging Face's.
        back: Hugging Face's -> Headway's.
    """

    there: Callable[[Tensors], Tensors]
    back: Callable[[Tensors], Tensors]


def _turned(tensor: Tensor) -> Tensor:
    return tensor.mT if tensor.dim() > 1 else tensor


SAME = Change(lambda x: x, lambda x: x)
TRANSPOSED = Change(lambda x: [_turned(x[0])], lambda x: [_turned(x[0])])
"""A linear layer that is stored [inputs, outputs] (GPT-2's Conv1D)."""
FUSED = Change(
    lambda x: [torch.cat([_turned(part) for part in x], -1)],
    lambda x: [_turned(part) for part in x[0].chunk(3, -1)],
)
"""Queries, keys and values in one matrix of three equal parts side by side (GPT-2's c_attn)."""
STACKED = Change(lambda x: list(x[0].unbind(0)), lambda x: [torch.stack(list(x))])
"""One tensor of all experts here, a tensor for each there."""

TWICE = Change(lambda x: [x[0], x[0].clone()], lambda x: [x[0]])
"""One tensor here, two names of it there, of which the first counts."""


def reshaped(ours: Sequence[int], theirs: Sequence[int]) -> Change:
    """The same numbers in the same order under another shape."""
    return Change(lambda x: [x[0].reshape(*theirs)], lambda x: [x[0].reshape(*ours)])


@dataclass(frozen=True)
class Link:
    """Tensors that belong together: canonical names, names of Hugging Face, and the change between them."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    change: Change = SAME


def link(ours: str, theirs: str, change: Change = SAME) -> Link:
    """One tensor on each side."""
    return Link((ours,), (theirs,), change)


def layers(
    table: Mapping[str, str],
    ours: str = "",
    theirs: str = "",
    kinds: Sequence[str] = ("weight", "bias"),
    change: Change = SAME,
) -> list[Link]:
    """Links of whole layers.

    Args:
        table: name of a layer here -> name there.
        ours, theirs: what stands before these names.
        kinds: parameters of a layer; those that neither side has do no harm.
    """
    pairs = [(f"{ours}{a}.{kind}", f"{theirs}{b}.{kind}") for a, b in table.items() for kind in kinds]
    return [link(a, b, change) for a, b in pairs]


class Lazy(NamedTuple):
    """Tensors by name, read when they are asked for."""

    names: frozenset[str]
    read: Callable[[str], Tensor]


def renamed(source: Lazy, rules: Iterable[tuple[str, str]]) -> Lazy:
    """The same tensors under names that older files or bare models spell otherwise: regular expressions in order.

    A name that a rule turns into nothing is left out.
    """
    places = {}
    for old in sorted(source.names):
        new = old
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        if new:
            places[new] = old
    return Lazy(frozenset(places), lambda name: source.read(places[name]))


def to_ours(links: Iterable[Link], source: Lazy) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, tensor) of everything that `source` has, one link at a time.

    Raises:
        CheckpointError: a part of what makes up a tensor is missing.
    """
    for each in links:
        lost = [name for name in each.theirs if name not in source.names]
        if len(lost) == len(each.theirs):
            continue
        if lost:
            raise CheckpointError(f"{', '.join(each.ours)} cannot be made: {', '.join(lost)} is missing")
        yield from zip(each.ours, each.change.back([source.read(n) for n in each.theirs]), strict=True)


def to_theirs(links: Sequence[Link], source: Lazy) -> Iterator[tuple[str, Tensor]]:
    """(name of Hugging Face, contiguous tensor) of everything that `source` has, one link at a time.

    Raises:
        CheckpointError: a tensor has no place on the other side, or half of what makes one up is missing.
    """
    if left := sorted(source.names - {name for each in links for name in each.ours}):
        raise CheckpointError(f"these tensors have no place in this kind of model: {', '.join(left)}")
    for each in links:
        lost = [name for name in each.ours if name not in source.names]
        if len(lost) == len(each.ours):
            continue
        if lost:
            raise CheckpointError(f"{', '.join(each.theirs)} cannot be made: {', '.join(lost)} is missing")
        made = each.change.there([source.read(name) for name in each.ours])
        yield from ((name, tensor.contiguous()) for name, tensor in zip(each.theirs, made, strict=True))
