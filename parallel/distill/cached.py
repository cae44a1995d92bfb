"""A teacher that computed before: what a student is compared with is read from a cache, by the keys of samples.

Every rank reads its own: the rows it has, and of these the columns, heads and layers that are its. Nothing is sent
but, for contrast, the keys of the global batch.

Shapes: B batch, S sequence, H heads, N samples of the global batch, E hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from headway.parallel.distill.record import names_of
from headway.parallel.distill.student import Seats
from headway.parallel.mesh import World
from headway.pretrain.data.teacher_cache import TeacherCache
from headway.pretrain.engine import Batch
from headway.pretrain.objectives.distill import names
from headway.pretrain.objectives.distill.distillation import Wanted

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
"""Of what is given, by the student's precision: that of its weights, unless autocast chooses. Then what is stored is
given as it is."""


class Piece(NamedTuple):
    """What a rank reads of a field: numbers of columns and of heads, None where all or where it has none."""

    name: str
    columns: Tensor | None = None
    heads: Tensor | None = None


class CachedTeacher:
    """A cache, read at the seats of a student. In evaluations, whose samples no cache holds, it gives nothing."""

    def __init__(self, cache: TeacherCache, seats: Seats, world: World, precision: str) -> None:
        """
        Args:
            cache: has all that any step wants.
            seats: what this student's ranks are about.
            world: of the student.
            precision: of the student, resolved.
        """
        self.cache, self.seats, self.world = cache, seats, world
        self.dtype = DTYPES.get(precision)
        self.known: dict[Wanted, list[Piece]] = {}

    def signature(self, step: int | None) -> str:
        return "nothing" if step is None else str(self.seats.distillation.wanted(step))

    def teach(self, micros: Sequence[Batch], step: int | None) -> Iterator[Batch]:
        """See `Teacher`.

        Raises:
            DataError: samples have no row in the cache.
        """
        if step is None:
            return iter([{} for _ in micros])
        wanted = self.seats.distillation.wanted(step)
        pieces = self._pieces(wanted)
        others = self._others(micros) if wanted.others else None
        return (self._read(micro, pieces, others) for micro in micros)

    def _read(self, micro: Batch, pieces: list[Piece], others_1NE: Tensor | None) -> Batch:
        columns = {piece.name: (0, piece.columns) for piece in pieces if piece.columns is not None}
        rows = self.cache.read(micro["key"], [piece.name for piece in pieces], columns)
        found = {}
        for name, _, heads in pieces:
            x = rows[name] if heads is None else rows[name].index_select(2, heads)
            found[name] = self._given(x)
        if others_1NE is not None:
            found[names.OTHERS] = others_1NE.expand(len(micro["key"]), -1, -1)
        return found

    def _given(self, x: Tensor) -> Tensor:
        """A tensor of the cache where and as the student reads it."""
        if x.is_floating_point():
            return x.to(self.world.device, self.dtype or x.dtype)
        return x.to(self.world.device, torch.int64)

    def _pieces(self, wanted: Wanted) -> list[Piece]:
        """What this rank reads at a step."""
        if wanted not in self.known:
            targets = {target.name: target for target in wanted.targets}
            found = []
            for name in names_of(wanted):
                # A teacher without a bias of scores has given none.
                if name == names.OTHERS or name not in self.cache.fields:
                    continue
                if name in targets:
                    length = self.seats.length(targets[name])
                    seat = self.seats.of_layer(self.world.rank, targets[name], self._one_row, length)
                elif len(self.cache.fields[name].shape) == 1 and name != names.REST:
                    length, seat = 0, self.seats.of_rows(self.world.rank, self._one_row, every=False)
                else:
                    length = self.seats.last_length
                    seat = self.seats.of_columns(self.world.rank, self._one_row, length)
                if not seat.empty:
                    heads = self.cache.fields[name].shape[1:2]
                    found.append(Piece(name, _some(seat.dims[1:2], (length,)), _some(seat.dims[2:3], heads)))
            self.known[wanted] = found
        return self.known[wanted]

    @property
    def _one_row(self) -> list[tuple[int, ...]]:
        """Seats are asked about a row, whichever it is."""
        return [(0,)] * self.seats.layout.data

    def _others(self, micros: Sequence[Batch]) -> Tensor | None:
        """Representations of the global batch in its order, [1, N, E]; None where this rank's stages want none.
        Collective."""
        key_N, slot_N = (torch.cat([micro[name] for micro in micros]) for name in ("key", "slot"))
        if self.world.size > 1:
            mine_2N = torch.stack((key_N, slot_N))
            every = [torch.empty_like(mine_2N) for _ in range(self.world.size)]
            dist.all_gather(every, mine_2N, group=self.world.everyone)
            first = [not (p.pipeline or p.context or p.tensor) for p in self.seats.places]
            key_N, slot_N = torch.cat([x for x, own in zip(every, first, strict=True) if own], 1)
        if self.seats.of_rows(self.world.rank, self._one_row, every=True).empty:
            return None
        rows = self.cache.read(key_N[slot_N.argsort()], [names.OTHERS])
        return self._given(rows[names.OTHERS]).unsqueeze(0)


def _some(numbers: tuple[tuple[int, ...], ...], total: tuple[int, ...]) -> Tensor | None:
    """Numbers along a dim as indices; None if they are all, or the tensor has no such dim."""
    if not numbers or numbers[0] == tuple(range(*total)):
        return None
    return torch.tensor(numbers[0])
