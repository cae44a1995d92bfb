"""Whether ranks that should hold the same bits do: parameters, moments, averages and buffers.

Every rank folds its tensors into a few 64-bit fingerprints, one for each set of ranks that hold the same slices, and
gathers those of all ranks: one collective of a few hundred bytes a rank. Only if ranks differ do they exchange
fingerprints of single tensors, to name the first one. A flipped bit always changes a fingerprint (`fingerprint`).

Such faults are real: "Dixit et al. 2021, Silent data corruptions at scale" (arXiv:2102.11245); replicas that drift
apart train on without an error, and the loss shows it late or never.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from headway.parallel.checkpoint.fragments import Fragment
from headway.parallel.mesh import World
from headway.parallel.watch.ranks import holders
from headway.pretrain.errors import DivergenceError
from headway.pretrain.optim.sharded import local

CHUNK = 1 << 18
"""Elements that are folded at once: bounds the memory that a check takes."""
GOLDEN = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio."""
KINDS = 8
"""Sets of ranks that a rank shares slices with, of which one collective tells: each subset of three axes, and one more
beside. Those of a rank that has more are told in a second one."""
TEXT = 512
"""Bytes of a sentence that one rank tells the others."""
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
"""Bytes of an element -> what its bits are read as; 64 bits as two halves: changes of high bits must not cancel."""

Rows = list[list[int]]
Groups = dict[frozenset[int], list[str]]
"""Ranks that hold the same slices -> names of those tensors, in order."""


def fingerprint(tensor: Tensor) -> Tensor:
    """A 64-bit sum over the bits of a tensor and their places: an int64 scalar on the tensor's device.

    Sum of (bits as an integer) x (odd weight of the place) modulo 2^64, by pieces of CHUNK elements, each times an odd
    weight of its own. A single changed bit changes the sum by 2^b times an odd number, b < 32, which is never 0; other
    changes cancel by accident only. Floats are never added, so nothing is rounded.
    """
    flat = tensor.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    flat = flat.view(INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for number, piece in enumerate(flat.split(CHUNK) if flat.numel() else ()):
        total += (piece * _weights(flat.device)[: piece.numel()]).sum() * _odd(number)
    return total


@lru_cache(maxsize=2)
def _weights(device: torch.device) -> Tensor:
    """Odd numbers, all different: int64 [CHUNK]."""
    return torch.arange(1, 2 * CHUNK, 2, device=device) * _odd(1)


def _odd(number: int) -> int:
    """An odd number for each number from 0, as int64 holds it; that of 0 is 1."""
    return (2 * number * GOLDEN + 1 + (1 << 63)) % (1 << 64) - (1 << 63)


def check(tensors: Mapping[str, Any], world: World, step: int, every: int) -> None:
    """Compare what ranks hold after a step; all ranks call it together.

    Args:
        tensors: state by canonical name; DTensors and fragments say who holds the same of them.
        step: number of the step, from 1.
        every: steps between checks.

    Raises:
        DivergenceError: on all ranks alike; names the ranks that differ from most and the first tensor.
    """
    if world.size == 1:
        return
    groups = grouped(tensors, world)
    prints = {name: fingerprint(_here(tensors[name])) for names in groups.values() for name in names}
    found = differences(_tables(groups, prints, world))
    if found:
        sentence = _describe(found, groups, prints, world)
        raise DivergenceError(_advice(found, sentence, step, every))


def _here(tensor: Tensor | Fragment) -> Tensor:
    return tensor.run if isinstance(tensor, Fragment) else local(tensor)


def grouped(tensors: Mapping[str, Any], world: World) -> Groups:
    """Tensors by the ranks that hold the same slice of them; those that no other rank holds are left out."""
    groups: Groups = {}
    for name in sorted(
        tensors, key=lambda n: (n.startswith(("ema.", "optimizer.")), n)
    ):  # parameters come first
        ranks = holders(tensors[name], world)
        if len(ranks) > 1:
            groups.setdefault(ranks, []).append(name)
    return groups


def _tables(groups: Groups, prints: Mapping[str, Tensor], world: World) -> list[Tensor]:
    """Every rank's sets: int64 [sets, 3] each; the hash of its ranks, the number of tensors, their fingerprints in one.

    A row before them says how many sets there are, as if it were one without tensors. The second collective is made by
    all ranks or by none, as all have seen these numbers.
    """
    own = _table(groups, prints, world.device)
    first = _gathered(_filled(own[: 1 + KINDS], 1 + KINDS), world)
    most = max(int(table[0, 0]) for table in first)
    if most <= KINDS:
        return first
    rest = _gathered(_filled(own[1 + KINDS :], most - KINDS), world)
    return [torch.cat(pair) for pair in zip(first, rest, strict=True)]


def _filled(table: Tensor, rows: int) -> Tensor:
    return torch.nn.functional.pad(table, (0, 0, 0, rows - len(table)))


def _table(groups: Groups, prints: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """int64 [1 + sets, 3]"""
    table = torch.zeros(1 + len(groups), 3, dtype=torch.int64)
    table[0, 0] = len(groups)
    folded = []
    for row, (ranks, names) in zip(table[1:], groups.items(), strict=True):
        row[0], row[1] = _key(ranks), len(names)
        folded.append(fingerprint(torch.stack([prints[name].to(device) for name in names])))
    table = table.to(device)
    if folded:
        table[1:, 2] = torch.stack(folded)
    return table


def _key(ranks: frozenset[int]) -> int:
    digest = hashlib.blake2b(repr(sorted(ranks)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _gathered(values: Tensor, world: World) -> list[Tensor]:
    """What every rank holds, on the CPU."""
    flat = values.reshape(-1)
    every = torch.empty(world.size * flat.numel(), dtype=flat.dtype, device=flat.device)
    dist.all_gather_into_tensor(every, flat, group=world.everyone)
    return list(every.view(world.size, *values.shape).cpu())


@dataclass(frozen=True)
class Difference:
    """Ranks that should hold the same bits and do not.

    Attributes:
        key: hash of them.
        ranks: all of them.
        others: those that differ from most; all of them if no value is that of more than half.
        tensors: how many tensors they share.
    """

    key: int
    ranks: list[int]
    others: list[int]
    tensors: int


def differences(tables: list[Tensor]) -> list[Difference]:
    """What differs in the gathered tables; the same on every rank."""
    held: dict[int, dict[int, tuple[int, int]]] = {}
    for rank, table in enumerate(tables):
        for key, count, value in table.tolist():
            if count:
                held.setdefault(key, {})[rank] = (count, value)
    found = []
    for key, values in held.items():
        others = minority(values)
        if others:
            found.append(Difference(key, list(values), others, max(count for count, _ in values.values())))
    return found


def minority(values: Mapping[int, object]) -> list[int]:
    """Ranks whose value is not that of more than half; all ranks if there is no such value; none if all are equal."""
    times: dict[object, int] = {}
    for value in values.values():
        times[value] = times.get(value, 0) + 1
    most, count = max(times.items(), key=lambda pair: pair[1])
    if len(times) == 1:
        return []
    return [rank for rank, value in values.items() if value != most or 2 * count <= len(values)]


def _describe(
    found: list[Difference], groups: Groups, prints: Mapping[str, Tensor], world: World
) -> list[str]:
    """For each difference, which tensors differ: told by its first rank to all. Collective."""
    sentences = []
    for difference in found:
        names = next((names for ranks, names in groups.items() if _key(ranks) == difference.key), [])
        mine = torch.zeros(difference.tensors, dtype=torch.int64, device=world.device)
        if names:
            values = torch.stack([prints[name].to(world.device) for name in names])
            mine[: len(values)] = values[: len(mine)]
        every = [row.tolist() for row in _gathered(mine, world)]
        sentence = "; ".join(_tensors(difference, names, every)) if world.rank == difference.ranks[0] else ""
        sentences.append(_told(sentence, difference.ranks[0], world))
    return sentences


def _tensors(difference: Difference, names: list[str], every: Rows) -> Iterator[str]:
    """Which tensors differ, and where."""
    wrong: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        others = minority({rank: every[rank][i] for rank in difference.ranks})
        if others:
            wrong[name] = others
    more = f" (the first of {len(wrong)} tensors of {len(names)})" if len(wrong) > 1 else ""
    for name, others in list(wrong.items())[:1]:
        yield f"{name}{more}, on rank{'s' * (len(others) > 1)} {', '.join(map(str, others))}"


def _told(sentence: str, source: int, world: World) -> str:
    """A sentence of one rank, on all ranks."""
    text = sentence.encode()[:TEXT]
    values = torch.zeros(TEXT, dtype=torch.uint8)
    values[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    values = values.to(world.device)
    dist.broadcast(values, source, group=world.everyone)
    return bytes(values.tolist()).rstrip(b"\0").decode(errors="replace")


def _advice(found: list[Difference], sentences: list[str], step: int, every: int) -> str:
    parts = []
    for difference, sentence in zip(found, sentences, strict=True):
        among, others = (", ".join(map(str, ranks)) for ranks in (difference.ranks, difference.others))
        if difference.others == difference.ranks:
            parts.append(f"ranks {among} should hold the same bits, and there is no majority: {sentence}")
        else:
            parts.append(f"rank {others} differs from most of ranks {among}: {sentence}")
    clean = step - every
    last = (
        f"The last check, after step {clean}, found them equal" if clean > 0 else "There was no check before"
    )
    return (
        f"step {step}: replicas have drifted apart. {'. '.join(parts)}. {last}: remove checkpoints of steps "
        f"{clean + 1} to {step}, take the machines of those ranks out (memory or links may be faulty), and start the "
        "run again; it goes on from the newest checkpoint that is left"
    )
