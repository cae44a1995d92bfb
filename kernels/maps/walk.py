"""Two models' scores, a block at a time: rows of some heads of some samples against all keys that they may see.

A block's temporaries stay in the caches, and all blocks use the same memory.

Shapes: B batch, H query heads, K key/value heads (in [H, Q, K]: keys), Q queries, S keys, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from headway.kernels.attention.dense import per_query_head
from headway.kernels.attention.slopes import Distances, Fixed, Slopes, block_of
from headway.kernels.maps.divergences import Divergence, Spare
from headway.kernels.maps.operands import Scores, Seen

ROWS = 128
"""Rows of a block: the products of fewer are slower."""
SIZE = 1 << 18
"""Numbers of a block, as far as one head's rows leave a choice: 1 MiB in fp32."""


@dataclass(frozen=True)
class Block:
    """A block, [B, H, Q, K], of some of everything.

    Attributes:
        samples, heads, queries, keys: which.
        sure: so many of the first keys are seen by all rows.
        hidden: of the keys after these those that are not seen, bool [1 or B, 1, Q, K]; None if all are.
    """

    samples: slice
    heads: slice
    queries: slice
    keys: slice
    sure: int
    hidden: Tensor | None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        parts = self.samples, self.heads, self.queries, self.keys
        b, h, q, k = (part.stop - part.start for part in parts)
        return b, h, q, k

    def counts(self, device: torch.device) -> Tensor:
        """Keys that the rows see, int64 [1 or B, 1, 1 or Q]."""
        if self.hidden is None:
            return torch.full((1, 1, 1), self.shape[3], device=device)
        return self.shape[3] - self.hidden.sum(-1)

    def rows(self, x: Tensor) -> Tensor:
        """The block's part of [B, H, Q, ...]."""
        return x[self.samples, self.heads, self.queries]

    def flat(self, x: Tensor, places: slice) -> Tensor:
        """A view of the block's part of [B, H, S, D], samples and heads in one dim, at these places."""
        return x[self.samples, self.heads].flatten(0, 1)[:, places]


def walk(student: Scores, seen: Seen) -> Iterator[Block]:
    """All blocks; those of the same rows and keys in a row."""
    (batch, heads, length, _), total = student.q.shape, student.k.shape[2]
    size = max(1, min(ROWS, length) * total)  # of a head's rows
    some_heads, some = min(heads, max(1, SIZE // size)), max(1, SIZE // (size * heads))
    for samples in cut(batch, some):
        within = seen.of(samples)
        for queries in cut(length, ROWS):
            keys = within.mask.keys_of(queries, total)
            sure = within.sure(queries, keys)
            found = within.block(student, queries, slice(keys.start + sure, keys.stop))
            hidden = None if found is None else ~found
            for part in cut(heads, some_heads):
                yield Block(samples, part, queries, keys, sure, hidden)


def cut(total: int, size: int) -> Iterator[slice]:
    """Runs of `size` and a last one of what is left."""
    return (slice(start, min(total, start + size)) for start in range(0, total, size))


class Memory:
    """Memory that all blocks use: by number, in the given dtype."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flat: dict[tuple[int, torch.dtype], Tensor] = {}

    def of(self, number: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Of any content; a tensor of the same number and dtype that was given before is lost."""
        size = torch.Size(shape).numel()
        flat = self.flat.get((number, dtype))
        if flat is None or flat.numel() < size:
            flat = self.flat[number, dtype] = torch.empty(size, dtype=dtype, device=self.device)
        return flat[:size].view(shape)


TEACHER, STUDENT, SPARE = 0, 1, 2
"""Numbers of memory; any after the last are spare too."""


@dataclass(frozen=True)
class Pair:
    """Both models, laid out for products of blocks.

    Attributes:
        teachers: G of them: the g-th has the heads g, G + g, 2 G + g ..., which are compared with heads 0, 1, 2 ...
        student: as many heads of keys as of queries.
        key_heads: the student's, before they were repeated.
        wide: of scores and sums.
        memory: for blocks.
    """

    teachers: tuple[Scores, ...]
    student: Scores
    key_heads: int
    wide: torch.dtype
    memory: Memory

    @classmethod
    def of(cls, teacher: Scores, student: Scores) -> Pair:
        group = teacher.q.shape[1] // student.q.shape[1]
        wide = torch.promote_types(torch.promote_types(teacher.q.dtype, student.q.dtype), torch.float32)
        every = _laid_out(teacher)
        teachers = tuple(
            Scores(every.q[:, g::group].contiguous(), every.k[:, g::group].contiguous(), every.scale,
                   _every(every.bias, g, group))
            for g in range(group)
        )  # fmt: skip
        return cls(teachers, _laid_out(student), student.k.shape[1], wide, Memory(student.q.device))

    def logs(
        self, block: Block, divergence: Divergence, sums: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-weights of teacher and student, or their scores if those are compared, [B, H, Q, K].

        `sums`: log-sum-exps of both, [B, G H, Q] and [B, H, Q], where the keys here are not all.
        """
        count, total = len(self.teachers), None
        for g, teacher in enumerate(self.teachers):
            t = self._scores(teacher, block, TEACHER if g == 0 else SPARE)
            if divergence.of_weights:
                t = _normalised(t, block, None if sums is None else sums[0][:, g::count])
            if total is None:
                total = t
            elif divergence.of_weights:
                torch.logaddexp(total, t, out=total)
            else:
                total += t
        assert total is not None
        if count > 1:
            total = total.sub_(math.log(count)) if divergence.of_weights else hide_(total.div_(count), block)
        s = self._scores(self.student, block, STUDENT)
        return total, _normalised(s, block, None if sums is None else sums[1]) if divergence.of_weights else s

    def _scores(self, scores: Scores, block: Block, number: int) -> Tensor:
        return block_scores(scores, block, self.memory, number, self.wide)

    def spare(self, block: Block) -> Spare:
        """Memory for a block's terms."""
        return lambda number: self.memory.of(SPARE + number, block.shape, self.wide)


def block_scores(scores: Scores, block: Block, memory: Memory, number: int, wide: torch.dtype) -> Tensor:
    """A block of scores; the least finite number where a row does not see."""
    q, k = block.flat(scores.q, block.queries), block.flat(scores.k, block.keys)
    out = memory.of(number, block.shape, wide)
    flat = out.flatten(0, 1)
    if q.dtype == wide:
        torch.baddbmm(flat, q, k.mT, beta=0, alpha=scores.scale, out=flat)
    else:
        narrow = memory.of(number, tuple(flat.shape), q.dtype)
        flat.copy_(torch.bmm(q, k.mT, out=narrow)).mul_(scores.scale)
    if scores.bias is not None:
        out += block_of(_heads(scores.bias, block.heads), block.queries, block.keys)
    return hide_(out, block)


def hide_(scores: Tensor, block: Block) -> Tensor:
    if block.hidden is not None:
        scores[..., block.sure :].masked_fill_(block.hidden, torch.finfo(scores.dtype).min)
    return scores


def _normalised(scores: Tensor, block: Block, lse: Tensor | None) -> Tensor:
    if lse is None:
        return torch.log_softmax(scores, -1, out=scores)
    return scores.sub_(block.rows(lse).unsqueeze(-1))


def _laid_out(scores: Scores) -> Scores:
    k = per_query_head(scores.k.detach(), scores.q)
    bias = scores.bias.detach() if isinstance(scores.bias, Tensor) else scores.bias
    return Scores(scores.q.detach().contiguous(), k.contiguous(), scores.scale, bias)


def _every(bias: Fixed | None, first: int, step: int) -> Fixed | None:
    """Of some heads."""
    if isinstance(bias, Slopes):
        return bias._replace(slopes=bias.slopes[first::step])
    if isinstance(bias, Distances):
        return bias._replace(table=bias.table[first::step])
    return None if bias is None else bias[first::step]


def _heads(bias: Fixed, heads: slice) -> Fixed:
    return bias[heads] if isinstance(bias, Tensor) else bias.of_heads(heads.start, heads.stop - heads.start)
