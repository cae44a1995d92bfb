"""From one layout to another: every rank sends what others want of what it holds, and nothing is ever whole anywhere.

What each holds and wants is known to all, so a single all-to-all of bytes moves any number of tensors; where every
rank holds what it wants, nothing is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from headway.parallel.distill.holdings import Holding

Picks = tuple[tuple[int, ...], ...]
"""Positions along every dim that can be cut."""


@dataclass(frozen=True)
class Route:
    """Which pieces of a tensor a rank takes from whom, and gives to whom.

    Attributes:
        takes: (from whom, positions there, positions here).
        gives: (to whom, positions here).
        shape: of what it wants, in dims that can be cut; None if it wants nothing.
        moves: whether any rank may take from another.
        same: whether all ranks want what they hold, as they hold it.
    """

    takes: list[tuple[int, Picks, Picks]] = field(default_factory=list)
    gives: list[tuple[int, Picks]] = field(default_factory=list)
    shape: tuple[int, ...] | None = None
    moves: bool = True
    same: bool = False


@dataclass(frozen=True)
class Item:
    """A tensor that changes hands: what this rank holds of it, and by which route. Its dims beyond those of the route
    are never cut; a rank that holds nothing has no rows of it."""

    tensor: Tensor
    route: Route


def route(have: Sequence[Holding], want: Sequence[Holding], rank: int) -> Route:
    """The route of a tensor for one rank. Of ranks that hold the same, the nearest before the taker in a circle gives
    it,
    the taker first: copies share the work."""
    if all(ours == theirs for ours, theirs in zip(have, want, strict=True)):
        whole = want[rank].dims
        every = tuple(tuple(range(len(numbers))) for numbers in whole)
        return Route([(rank, every, every)], [], tuple(map(len, whole)), moves=False, same=True)
    takes = _sources(have, want[rank], rank)
    gives = [
        (taker, there)
        for taker, wanted in enumerate(want)
        if taker != rank and common(have[rank], wanted)
        for giver, there, _ in _sources(have, wanted, taker)
        if giver == rank
    ]
    shape = None if want[rank].empty else tuple(map(len, want[rank].dims))
    return Route(takes, gives, shape, moves=len(have) > 1)


def _sources(have: Sequence[Holding], want: Holding, taker: int) -> list[tuple[int, Picks, Picks]]:
    """From whom a rank takes the pieces of what it wants."""
    found: list[tuple[int, Picks, Picks]] = []
    seen: set[Picks] = set()
    for step in range(len(have)):
        giver = (taker - step) % len(have)
        piece = common(have[giver], want)
        if piece is not None and piece[1] not in seen:
            seen.add(piece[1])
            found.append((giver, *piece))
    return found


def common(have: Holding, want: Holding) -> tuple[Picks, Picks] | None:
    """Positions, in one and the other, of what two holdings have in common; None if that is nothing."""
    there, here = [], []
    for theirs, ours in zip(have.dims, want.dims, strict=True):
        if theirs == ours:
            every = tuple(range(len(ours)))
            both = list(zip(every, every, strict=True))
        else:
            at = {number: i for i, number in enumerate(theirs)}
            both = [(at[number], i) for i, number in enumerate(ours) if number in at]
        if not both:
            return None
        mine, other = zip(*both, strict=True)
        there.append(mine)
        here.append(other)
    return tuple(there), tuple(here)


def exchange(
    items: Sequence[Item], rank: int, ranks: int, group: dist.ProcessGroup | None = None
) -> list[Tensor | None]:
    """What this rank wants of every item, None where it wants nothing. Collective where anything moves.

    Args:
        rank: this one's number among `ranks`, in the order of holdings, which is that of the group.
    """
    found = [_local(item, rank) for item in items]
    if not any(item.route.moves for item in items):
        return found
    device = items[0].tensor.device
    outgoing: list[list[Tensor]] = [[] for _ in range(ranks)]
    sizes = [0] * ranks
    for item in items:
        for taker, picks in item.route.gives:
            outgoing[taker].append(_take(item.tensor, picks).contiguous().view(-1).view(torch.uint8))
        for giver, _, here in item.route.takes:
            sizes[giver] += _bytes(item, here) if giver != rank else 0
    received = _all_to_all(outgoing, sizes, group, device)
    offsets = [0] * ranks
    for item, target in zip(items, found, strict=True):
        for giver, _, here in item.route.takes:
            if giver == rank:
                continue
            assert target is not None
            size = _bytes(item, here)
            piece = received[giver][offsets[giver] : offsets[giver] + size].clone()  # clone: aligned
            offsets[giver] += size
            shape = [*map(len, here), *item.tensor.shape[len(here) :]]
            _put(target, here, piece.view(item.tensor.dtype).view(shape))
    return found


def _local(item: Item, rank: int) -> Tensor | None:
    """Memory for what is wanted, with what was here all the time; the tensor itself where it is that."""
    if item.route.shape is None:
        return None
    if item.route.same:
        return item.tensor
    target = item.tensor.new_empty(*item.route.shape, *item.tensor.shape[len(item.route.shape) :])
    for giver, there, here in item.route.takes:
        if giver == rank:
            _put(target, here, _take(item.tensor, there))
    return target


def _all_to_all(
    outgoing: list[list[Tensor]], sizes: list[int], group: dist.ProcessGroup | None, device: torch.device
) -> list[Tensor]:
    """Bytes from every rank."""
    empty = torch.empty(0, dtype=torch.uint8, device=device)
    joined = [torch.cat([empty, *pieces]) for pieces in outgoing]
    received = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    dist.all_to_all_single(received, torch.cat(joined), sizes, [len(piece) for piece in joined], group=group)
    return list(received.split(sizes))


def _take(tensor: Tensor, picks: Picks) -> Tensor:
    for dim, numbers in enumerate(picks):
        first, count = numbers[0], len(numbers)
        if numbers == tuple(range(first, first + count)):
            tensor = tensor.narrow(dim, first, count)
        else:
            tensor = tensor.index_select(dim, torch.tensor(numbers, device=tensor.device))
    return tensor


def _put(target: Tensor, picks: Picks, piece: Tensor) -> None:
    index = [torch.tensor(numbers, device=target.device) for numbers in picks]
    target[torch.meshgrid(*index, indexing="ij")] = piece


def _bytes(item: Item, picks: Picks) -> int:
    count = item.tensor.element_size()
    for size in (*map(len, picks), *item.tensor.shape[len(picks) :]):
        count *= size
    return count
