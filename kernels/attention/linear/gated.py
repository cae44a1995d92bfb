"""Gated linear attention: S_t = diag(a_t) S_{t-1} + k_t v_t^T, o_t = q_t^T S_t (Yang et al. 2024a, equation 3).

The state forgets in every dimension of the keys by a gate of its own: a = sigmoid(decay)^(1/16) (section 4.4).
In chunks a key weighs prod of a between it and the query; written as a quotient of products from the chunk's start,
those leave the range of floats. So a chunk is halved again and again: keys of a first half meet queries of the second
by way of the border between them, and no exponent is above 0 (the paper's secondary chunks, section 4.3, in full).

Shapes: B batch, H query heads, K key/value heads, S tokens, D head dimension, N chunks, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.attention.dense import WeightDropout, per_query_head, score_scale
from headway.kernels.attention.linear.featured import segments
from headway.kernels.attention.linear.scan import (
    Ties,
    carried,
    chunked,
    edges,
    exactly,
    operand_dtype,
    scaled,
)
from headway.kernels.attention.masks import Mask

CHUNK = 64
TEMPERATURE = 16


def log_decay(decay: Tensor) -> Tensor:
    """Logarithm of the gate, in fp32 or wider; near 0 at first, so that states remember."""
    return F.logsigmoid(decay.to(torch.promote_types(decay.dtype, torch.float32))) / TEMPERATURE


def reference(
    q_BHSD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
    bias_HQK: Tensor | None = None,
    *,
    decay: Tensor,
) -> Tensor:
    """The specification of gated linear attention, token by token; returns [B, H, S, D].

    Args:
        mask: causal; a state begins at 0 with each document.
        scale: factor of the queries; 1 / sqrt(D) if None.
        decay: [B, H, S, D], before the sigmoid.

    `dropout` and `bias_HQK` must be None.
    """
    assert dropout is None
    assert bias_HQK is None
    assert mask.triangular
    assert mask.scope is None
    wide = torch.promote_types(q_BHSD.dtype, torch.float32)
    q, k, v = (per_query_head(x, q_BHSD).to(wide).unbind(2) for x in (q_BHSD, k_BKSD, v_BKSD))
    kept = log_decay(decay).exp().unbind(2)
    state, outs = torch.zeros_like(k[0][..., None] * v[0][..., None, :]), []
    with exactly(q_BHSD):
        for t, keep in enumerate(kept):
            if t and mask.documents is not None:
                begins = mask.documents[:, t] != mask.documents[:, t - 1]
                state = state.masked_fill(begins[:, None, None, None], 0)
            state = keep[..., None] * state + k[t][..., None] * v[t][..., None, :]
            outs.append((q[t][..., None] * state).sum(-2) * score_scale(scale, q_BHSD))
    return torch.stack(outs, 2).to(v_BKSD.dtype)


def attention(
    q_BHSD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
    bias_HQK: Tensor | None = None,
    *,
    decay: Tensor,
) -> Tensor:
    """As `reference`, by chunks: O(S D (D + C)) time, O(S (D + C)) memory."""
    assert dropout is None
    assert bias_HQK is None
    assert mask.triangular
    assert mask.scope is None
    wide, length = torch.promote_types(q_BHSD.dtype, torch.float32), q_BHSD.shape[2]
    chunk = min(CHUNK, 1 << (length - 1).bit_length())  # halves need a power of two
    k_BHSD, v_BHSD = (per_query_head(x, q_BHSD).to(wide) for x in (k_BKSD, v_BKSD))
    given = q_BHSD.to(wide) * score_scale(scale, q_BHSD), k_BHSD, v_BHSD, log_decay(decay)
    documents = None if mask.documents is None else chunked(mask.documents[:, None], chunk, -1)
    out = _Gated.apply(*(chunked(x, chunk) for x in given), documents)
    return out.flatten(2, 3)[:, :, :length].to(v_BKSD.dtype)


def in_triton(
    q_BHSD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
    bias_HQK: Tensor | None = None,
    *,
    decay: Tensor,
) -> Tensor:
    """As `attention`, by Triton's kernels, on GPUs."""
    from headway.kernels.triton.gated_linear import gated_linear

    assert dropout is None
    assert bias_HQK is None
    dtype = operand_dtype(v_BKSD)
    q, k, v = (x.to(dtype) for x in (q_BHSD, k_BKSD, v_BKSD))
    return gated_linear(q, k, v, mask, scale, decay=decay).to(v_BKSD.dtype)


class _Gated(torch.autograd.Function):
    """Chunks of queries, keys, values and logarithms of gates, segment by segment. What is formed inside of chunks is
    formed again in the backward; a state is kept for each segment."""

    @staticmethod
    def forward(ctx, q, k, v, log, documents):
        parts, lefts, outs = _parts(q), [], []
        state: Tensor | None = None
        with exactly(q):
            for part in parts:
                lefts.append(state)
                q_, k_, v_, total, same, enter, leave, through = _segment(q, k, v, log, documents, part)
                states, state = carried((k_ * leave).mT @ v_, through, state)
                outs.append(scaled(_products(q_, k_, total), same) @ v_ + (q_ * enter) @ states)
        ctx.save_for_backward(q, k, v, log, documents, *lefts)
        return torch.cat(outs, 2)

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, log, documents, *lefts = ctx.saved_tensors
        found, d_state = [], None
        with exactly(q):
            for part, state in zip(reversed(_parts(q)), reversed(lefts), strict=True):
                d = d_out[:, :, part]
                q_, k_, v_, total, same, enter, leave, through = _segment(q, k, v, log, documents, part)
                states, _ = carried((k_ * leave).mT @ v_, through, state)
                # Of what chunks hand on:
                d_states, d_state = carried((q_ * enter).mT @ d, through, d_state, back=True)
                dv = scaled(_products(q_, k_, total), same).mT @ d + (k_ * leave) @ d_states
                dq, dk = _product_gradients(scaled(d @ v_.mT, same), q_, k_, total)
                dq += d @ states.mT * enter
                handed = v_ @ d_states.mT * leave
                dk += handed
                # Gates up to t raise what query t reads and lower what key t gives (appendix C); those up to the
                # chunk's end raise what it hands on.
                d_total = q_ * dq - k_ * dk
                d_total[..., -1, :] += (k_ * handed).sum(-2) + (through * states * d_states).sum(-1)
                found.append((dq, dk, dv, d_total.flip(-2).cumsum(-2).flip(-2)))
        return *(torch.cat(x[::-1], 2) for x in zip(*found, strict=True)), None


def _parts(q: Tensor) -> list[slice]:
    return segments(q.shape[2], q[:, :, 0].numel(), q.device)


def _segment(q, k, v, log, documents, part):
    """Queries, keys and values of a segment, logarithms summed from each chunk's start, and what documents and gates
    let pass."""
    q, k, v, log = (x[:, :, part] for x in (q, k, v, log))
    same, *sides = Ties(q.shape[3], q.device, False, documents).of(part)
    total = log.cumsum(-2)
    return q, k, v, total, same, *edges(total, *sides)


def _halves(q: Tensor, k: Tensor, total: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """Of each size of halves: the size, queries of second halves and keys of first ones, both decayed to the border
    between them, [..., pairs, size, D], and these decays."""
    size = q.shape[-2] // 2
    while size:
        early_k, late_q = _pairs(k, size)[..., 0, :, :], _pairs(q, size)[..., 1, :, :]
        early, late = _pairs(total, size).unbind(-3)
        border = early[..., -1:, :]
        to_late, to_early = (late - border).exp(), (border - early).exp()
        yield size, late_q * to_late, early_k * to_early, to_late, to_early
        size //= 2


def _pairs(x: Tensor, size: int) -> Tensor:
    return x.unflatten(-2, (-1, 2, size))


def _corner(x: Tensor, size: int) -> Tensor:
    """Of [..., C, C] the products of second halves with first ones, a view [..., pairs, size, size]."""
    blocks = x.unflatten(-1, (-1, 2, size)).unflatten(-4, (-1, 2, size))
    return blocks[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _products(q: Tensor, k: Tensor, total: Tensor) -> Tensor:
    """sum_d q_td k_jd exp(total_td - total_jd) for j <= t, else 0, [..., C, C]."""
    products = q.new_zeros(*q.shape[:-1], q.shape[-2])
    products.diagonal(dim1=-2, dim2=-1).copy_((q * k).sum(-1))
    for size, late, early, _, _ in _halves(q, k, total):
        _corner(products, size).copy_(late @ early.mT)
    return products


def _product_gradients(d_products: Tensor, q: Tensor, k: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of q and k."""
    own = d_products.diagonal(dim1=-2, dim2=-1)[..., None]
    dq, dk = own * k, own * q
    for size, late, early, to_late, to_early in _halves(q, k, total):
        corner = _corner(d_products, size)
        _pairs(dq, size)[..., 1, :, :] += corner @ early * to_late
        _pairs(dk, size)[..., 0, :, :] += corner.mT @ late * to_early
    return dq, dk
