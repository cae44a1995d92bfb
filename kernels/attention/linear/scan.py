"""Chunks of a sequence and the states that pass between them: what linear attention's kin share.

Inside a chunk products of queries and keys are formed as in dense attention, and what chunks before it hold reaches it
as one state, the sum of k v^T (Hua et al. 2022, section 3.3; Yang et al. 2024a, section 4.1). Time and memory are O(n);
only states of chunks exist, never one of a token. A state holds one document: documents are contiguous, so what a
chunk hands on is the document that it ends with.

Shapes: B batch, H heads, S tokens, N chunks, C tokens of a chunk, M features of keys, D of values.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Joints(NamedTuple):
    """How tokens and states of chunks hang together; None is 1 everywhere.

    Attributes:
        within: factor of a query's product with a key of its chunk, [..., C, C]; 0 where it sees it not.
        left: factor [B, 1 or H, N, C, 1] of the state that comes from the left, in each token; 0 where the token is
            of another document than the chunk before ends with.
        right: factor, of the same shape, of a token in what its chunk hands to the right; 0 where the token is of
            another document than its chunk ends with.
        through: factor [B, 1 or H, N, 1, 1] of a state that passes a chunk; 0 where a document ends in it.
    """

    within: Tensor | None
    left: Tensor | None
    right: Tensor | None
    through: Tensor | None


class Ties(NamedTuple):
    """What `Joints` follow from.

    Attributes:
        chunk: tokens of a chunk.
        device: where they are.
        causal: whether a query sees keys up to its own place; else it sees all of its document.
        documents: [B, 1, N, C], or None for one document.
        level: [B, H, N, C], or None. Keys then weigh exp(level of the key - level of the query): it does not fall
            inside a document, so that no factor exceeds 1.
    """

    chunk: int
    device: torch.device
    causal: bool = True
    documents: Tensor | None = None
    level: Tensor | None = None

    def of(self, chunks: slice = slice(None)) -> Joints:
        """Joints of some of the chunks."""
        within = left = right = through = None
        if self.causal:
            within = torch.ones(self.chunk, self.chunk, dtype=torch.bool, device=self.device).tril()
        if self.documents is not None:
            documents, before = self.documents[:, :, chunks], _before(self.documents)[:, :, chunks]
            same = documents[..., :, None] == documents[..., None, :]
            within = same if within is None else within & same
            ends = documents[..., -1:]
            left, right, through = (
                x[..., None] for x in (documents == before, documents == ends, before == ends)
            )
        if self.level is None:
            return Joints(within, left, right, through)
        level, before = self.level[:, :, chunks], _before(self.level)[:, :, chunks]
        ends = level[..., -1:]
        return Joints(
            _decayed(level[..., None, :] - level[..., :, None], within),
            _decayed((before - level)[..., None], left),
            _decayed((level - ends)[..., None], right),
            _decayed((before - ends)[..., None], through),
        )


def _before(x_BHNC: Tensor) -> Tensor:
    """The last value of the chunk before, [B, H, N, 1]; of the first chunk its own first value: no state comes in."""
    return torch.cat([x_BHNC[:, :, :1, :1], x_BHNC[:, :, :-1, -1:]], 2)


def _decayed(exponent: Tensor, seen: Tensor | None) -> Tensor:
    return (exponent if seen is None else exponent.masked_fill(~seen, -math.inf)).exp()


def edges(
    total: Tensor, left: Tensor | None, right: Tensor | None, through: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of a state that decays: as it comes to each token, of each token as the chunk is left, and through it.

    Args:
        total: logarithms of decays summed from the chunk's start, [B, H, N, C, M] or [B, H, N, C, 1].
        left, right, through: what documents let pass, as in `Joints`.

    Returns:
        [B, H, N, C, M or 1] twice, and [B, H, N, M or 1, 1].
    """
    end = total[..., -1:, :]
    return scaled(total.exp(), left), scaled((end - total).exp(), right), scaled(end.exp().mT, through)


def carried(
    updates: Tensor, through: Tensor | None, state: Tensor | None = None, back: bool = False
) -> tuple[Tensor, Tensor]:
    """States [B, H, N, M, D] that reach each chunk, and the one that leaves the last.

    Args:
        updates: what each chunk adds.
        through: factor of a state that passes each chunk.
        state: that reaches the first chunk; 0 if None.
        back: from the right to the left.
    """
    added = updates.unbind(2)
    passes = [None] * len(added) if through is None else through.to(updates.dtype).unbind(2)
    state = torch.zeros_like(added[0]) if state is None else state
    states = []
    places = range(len(added))
    for n in reversed(places) if back else places:
        states.append(state)
        kept = passes[n]
        state = state + added[n] if kept is None else torch.addcmul(added[n], state, kept)
    return torch.stack(states[::-1] if back else states, 2), state


def chunked(x: Tensor, chunk: int, value: float = 0) -> Tensor:
    """[B, H, S, ...] -> [B, H, N, C, ...], filled up with `value`."""
    lacks = -x.shape[2] % chunk
    if lacks:
        x = F.pad(x, [0, 0] * (x.dim() - 3) + [0, lacks], value=value)
    return x.unflatten(2, (-1, chunk))


def scaled(x: Tensor, factor: Tensor | float | None) -> Tensor:
    return x if factor is None else x * factor


def operand_dtype(x: Tensor) -> torch.dtype:
    """What Triton's kernels take for values x: x's dtype, but fp32 for fp16, which sums of a sequence leave."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def exactly(x: Tensor) -> AbstractContextManager[Any]:
    """No autocast: states sum over the whole sequence, so their products are not rounded to 16 bits."""
    device = x.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
