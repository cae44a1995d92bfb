"""The gated delta rule: S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T (Yang et al. 2025, equation 10).

A state is a memory from keys to values. A token corrects what its key finds there towards its own value, by the
fraction b, after everything was forgotten by the factor a. Transposed to the paper: o_t = q_t^T S_t.

Shapes: B batch, H query heads, K key/value heads, S tokens, D head dimension, N chunks, C tokens of a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.attention.dense import WeightDropout, per_query_head, score_scale
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.scan import Ties, chunked, edges, exactly, scaled

CHUNK = 64


def reference(
    q_BHSD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
    bias_HQK: Tensor | None = None,
    *,
    beta: Tensor,
    decay: Tensor,
    decay_rate: Tensor,
    decay_shift: Tensor,
) -> Tensor:
    """The specification of the gated delta rule, token by token; returns [B, H, S, D].

    Queries and keys are brought to unit norm.

    Args:
        mask: causal; a state begins at 0 with each document.
        scale: factor of the queries; 1 / sqrt(D) if None.
        beta: [B, H, S, 1]; b = sigmoid(beta).
        decay: [B, H, S, 1]; a = exp(-exp(decay_rate) softplus(decay + decay_shift)), as in Mamba 2 (Dao and Gu 2024).
        decay_rate, decay_shift: [H], learned.

    `dropout` and `bias_HQK` must be None.
    """
    assert dropout is None
    assert bias_HQK is None
    assert mask.triangular
    assert mask.scope is None
    q, k, v, b, log = _prepared(q_BHSD, k_BKSD, v_BKSD, scale, beta, decay, decay_rate, decay_shift)
    state, outs = torch.zeros_like(k[:, :, 0, :, None] * v[:, :, 0, None, :]), []
    with exactly(q):
        for t in range(q.shape[2]):
            if t and mask.documents is not None:
                begins = mask.documents[:, t] != mask.documents[:, t - 1]
                state = state.masked_fill(begins[:, None, None, None], 0)
            state = state * log[:, :, t, :, None].exp()
            key = k[:, :, t, :, None]
            found = (key * state).sum(-2)
            state = state + key * (b[:, :, t] * (v[:, :, t] - found))[..., None, :]
            outs.append((q[:, :, t, :, None] * state).sum(-2))
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
    beta: Tensor,
    decay: Tensor,
    decay_rate: Tensor,
    decay_shift: Tensor,
) -> Tensor:
    """As `reference`, by chunks: O(S D (D + C)) time, O(S (D + C)) memory.

    What the tokens of a chunk write depends on what earlier ones of it wrote: a unit triangular system, solved for all
    chunks at once, in the values and in the keys (the WY form, Yang et al. 2024b, section 3.2). The state then takes
    two products a chunk.
    """
    assert dropout is None
    assert bias_HQK is None
    assert mask.triangular
    assert mask.scope is None
    given = _prepared(q_BHSD, k_BKSD, v_BKSD, scale, beta, decay, decay_rate, decay_shift)
    length = q_BHSD.shape[2]
    chunk = min(CHUNK, length)
    documents = None if mask.documents is None else chunked(mask.documents[:, None], chunk, -1)
    q, k, v, b, log = (chunked(x, chunk) for x in given)
    with exactly(q):
        within, *sides = Ties(chunk, q.device, True, documents).of()
        enter, _, through = edges(log.cumsum(-2), *sides)
        # Between two tokens: summed for each pair, for a difference of sums from the chunk's start would keep few
        # digits after a token that forgets all.
        between = log.expand(*log.shape[:-1], chunk).tril(-1).cumsum(-2)
        leave = scaled(between[..., -1, :, None].exp(), sides[1])
        assert within is not None
        decays = between.masked_fill(~within, -torch.inf).exp()
        earlier = (b * (k @ k.mT) * decays).tril(-1)
        right = torch.cat([b * v, b * enter * k], -1)
        # The diagonal is not read: it is taken for ones.
        solved = torch.linalg.solve_triangular(earlier, right, upper=False, unitriangular=True)
        values, reads = solved.split(v.shape[-1], -1)
        states, written = _carried(values, reads, k * leave, through)
        out = (q * enter) @ states + (q @ k.mT * decays) @ written
    return out.flatten(2, 3)[:, :, :length].to(v_BKSD.dtype)


def _prepared(q, k, v, scale, beta, decay, rate, shift):
    """Queries, keys and values [B, H, S, D], fractions b and logarithms of a [B, H, S, 1], in fp32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    unit_q, unit_k = (F.normalize(x.to(wide), dim=-1) for x in (q, k))
    soft = F.softplus(decay.to(wide) + shift.to(wide)[:, None, None])
    log = -rate.to(wide).exp()[:, None, None] * soft
    k_BHSD, v_BHSD = (per_query_head(x, q) for x in (unit_k, v.to(wide)))
    return unit_q * score_scale(scale, q), k_BHSD, v_BHSD, beta.to(wide).sigmoid(), log


def _carried(values: Tensor, reads: Tensor, gives: Tensor, through: Tensor) -> tuple[Tensor, Tensor]:
    """States [B, H, N, D, D] that reach each chunk, and what its tokens write, [B, H, N, C, D].

    Args:
        values: what they would write into an empty state.
        reads: keys by which the state lessens that.
        gives: keys under which the chunk hands it on.
        through: factor of the state that passes.
    """
    parts = zip(*(x.unbind(2) for x in (values, reads, gives, through)), strict=True)
    state = torch.zeros_like(gives[:, :, 0].mT @ values[:, :, 0])
    states, written = [], []
    for value, read, give, kept in parts:
        states.append(state)
        written.append(value - read @ state)
        state = kept * state + give.mT @ written[-1]
    return torch.stack(states, 2), torch.stack(written, 2)
