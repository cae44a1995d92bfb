"""Sums over the keys before a query, in time and memory O(n): the scan that linear attention's kin share.

A sequence is cut into chunks. Inside a chunk products of queries and keys are formed as in dense attention, and what
chunks before it hold reaches it as one state, the sum of k v^T (Hua et al. 2022, section 3.3; Yang et al. 2024,
section 4.1). Only states of chunks exist, never one of a token. A state holds one document: documents are contiguous,
so what a chunk hands on is the document that it ends with.

Shapes: B batch, H heads, S tokens, N chunks, C tokens of a chunk, M features of keys, D of values.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 128


class Joints(NamedTuple):
    """How tokens and states of chunks hang together; None is one everywhere.

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


def chunked(x: Tensor, chunk: int, value: float = 0) -> Tensor:
    """[B, H, S, ...] -> [B, H, N, C, ...], filled up with `value`."""
    lacks = -x.shape[2] % chunk
    if lacks:
        x = F.pad(x, [0, 0] * (x.dim() - 3) + [0, lacks], value=value)
    return x.unflatten(2, (-1, chunk))


def joints(like: Tensor, documents: Tensor | None, level: Tensor | None, causal: bool = True) -> Joints:
    """What `Joints` says, of chunks like `like` [B, H, N, C, ...].

    Args:
        documents: [B, 1, N, C], or None for one document.
        level: [B, H, N, C], or None. Keys then weigh exp(level of the key - level of the query): it does not fall
            inside a document, so that no factor exceeds 1.
        causal: whether a query sees keys up to its own place; else it sees all of its document.
    """
    within = None
    if causal:
        within = torch.ones(like.shape[3], like.shape[3], dtype=torch.bool, device=like.device).tril()
    left = right = through = None
    if documents is not None:
        ends, before = documents[..., -1:], _before(documents)
        same = documents[..., :, None] == documents[..., None, :]
        within = same if within is None else within & same
        left, right, through = documents == before, documents == ends, before == ends
        left, right, through = left[..., None], right[..., None], through[..., None]
    if level is None:
        return Joints(within, left, right, through)
    ends, before = level[..., -1:], _before(level)
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


def carried(updates: Tensor, through: Tensor | None, back: bool = False) -> Tensor:
    """States [B, H, N, M, D] that reach each chunk, from what each adds; `back`: from the right to the left."""
    added = updates.unbind(2)
    passes = [None] * len(added) if through is None else through.unbind(2)
    state, states = torch.zeros_like(added[0]), []
    places = range(len(added))
    for n in reversed(places) if back else places:
        states.append(state)
        kept = passes[n]
        state = state + added[n] if kept is None else torch.addcmul(added[n], state, kept.to(state.dtype))
    return torch.stack(states[::-1] if back else states, 2)


def sums(
    q_BHSM: Tensor,
    k_BHSM: Tensor,
    v_BHSD: Tensor,
    documents: Tensor | None = None,
    level: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """sum_j (q_i . k_j) exp(level_j - level_i) v_j over the keys j that query i sees, [B, H, S, D].

    Args:
        documents: int [B, S], contiguous; a query sees keys of its own.
        level: [B, H, S], takes no gradient; see `joints`. Needs `causal`.
        causal: only keys up to the query's own place.
    """
    length = q_BHSM.shape[2]
    chunk = min(CHUNK, length)
    q, k, v = (chunked(x, chunk) for x in (q_BHSM, k_BHSM, v_BHSD))
    if documents is not None:
        documents = chunked(documents[:, None], chunk, -1)
    if level is not None:
        # Behind the end the level is as high as can be, so that it never falls; keys are 0 there.
        level = chunked(level, chunk, float(torch.finfo(level.dtype).max))
    return _Sums.apply(q, k, v, documents, level, causal).flatten(2, 3)[:, :, :length]


def sums_over_documents(
    q_BHQM: Tensor, k_BHSM: Tensor, v_BHSD: Tensor, documents: Tensor, key_documents: Tensor
) -> Tensor:
    """sum_j (q_i . k_j) v_j over the keys of the query's document, [B, H, Q, D], where keys are another sequence.

    Keys and queries are put into one sequence, of each document the keys and then the queries, and scanned: no state
    of a document need be kept until its queries are found.
    """
    keys, queries = k_BHSM.shape[2], q_BHQM.shape[2]
    documents = torch.cat([key_documents, documents], 1)
    order = documents.argsort(dim=1, stable=True)
    at = order[:, None, :, None]
    q = F.pad(q_BHQM, (0, 0, keys, 0)).take_along_dim(at, 2)
    k, v = (F.pad(x, (0, 0, 0, queries)).take_along_dim(at, 2) for x in (k_BHSM, v_BHSD))
    out = sums(q, k, v, documents.take_along_dim(order, 1))
    return out.take_along_dim(order.argsort(dim=1)[:, None, keys:, None], 2)


def exactly(x: Tensor) -> AbstractContextManager[Any]:
    """No autocast: states sum over the whole sequence, so their products are not rounded to 16 bits."""
    device = x.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


class _Sums(torch.autograd.Function):
    """Chunks as in `joints`. Products inside of chunks are formed again in the backward, not kept."""

    @staticmethod
    def forward(ctx, q, k, v, documents, level, causal):
        ctx.save_for_backward(q, k, v, documents, level)
        ctx.causal = causal
        with exactly(q):
            within, left, right, through = joints(q, documents, level, causal)
            out = scaled(q @ k.mT, within) @ v
            out += scaled(q, left) @ carried(scaled(k, right).mT @ v, through)
            if not causal:
                out += scaled(q, right) @ carried(scaled(k, left).mT @ v, through, back=True)
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, documents, level = ctx.saved_tensors
        with exactly(q):
            within, left, right, through = joints(q, documents, level, ctx.causal)
            weights = scaled(q @ k.mT, within)
            dv = weights.mT @ d_out
            d_weights = scaled(d_out @ v.mT, within)
            dq, dk = d_weights @ k, d_weights.mT @ q
            sides = [(left, right, False)] if ctx.causal else [(left, right, False), (right, left, True)]
            for reads, gives, back in sides:
                state = carried(scaled(k, gives).mT @ v, through, back)
                dq += scaled(d_out @ state.mT, reads)
                d_state = carried(scaled(q, reads).mT @ d_out, through, not back)
                dk += scaled(v @ d_state.mT, gives)
                dv += scaled(k, gives) @ d_state
        return dq, dk, dv, None, None, None
