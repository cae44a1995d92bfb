"""The gated delta rule: S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T (Yang et al. 2025, equation 10).

A state is a memory from keys to values. A token corrects what its key finds there towards its own value, by the
fraction b, after everything was forgotten by the factor a. Transposed to the paper: o_t = q_t^T S_t.

Shapes: B batch, H query heads, K key/value heads, S tokens, D head dimension, N chunks, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.attention.dense import WeightDropout, per_query_head, score_scale
from headway.kernels.attention.linear.featured import segments
from headway.kernels.attention.linear.scan import Ties, chunked, edges, exactly, operand_dtype, scaled
from headway.kernels.attention.masks import Mask

CHUNK = 64
WIDEST = 256
"""Head dimension at most, of Triton's kernels: a walk has all of a key's dimensions in registers."""


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
    """As `reference`, by chunks: O(S D (D + C)) time, O(S D) memory.

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
    out = _Delta.apply(*(chunked(x, chunk) for x in given), documents)
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
    beta: Tensor,
    decay: Tensor,
    decay_rate: Tensor,
    decay_shift: Tensor,
) -> Tensor:
    """As `attention`, by Triton's kernels, on GPUs."""
    from headway.kernels.triton.delta_rule import delta_rule

    assert dropout is None
    assert bias_HQK is None
    given = _prepared(q_BHSD, k_BKSD, v_BKSD, scale, beta, decay, decay_rate, decay_shift)
    q, k, v = (x.to(operand_dtype(v_BKSD)) for x in given[:3])
    beta_BHS, log_BHS = (x.squeeze(-1) for x in given[3:])
    return delta_rule(q, k, v, mask, beta_BHS=beta_BHS, log_decay_BHS=log_BHS).to(v_BKSD.dtype)


def _prepared(q, k, v, scale, beta, decay, rate, shift):
    """Queries, keys and values [B, H, S, D], fractions b and logarithms of a [B, H, S, 1], in fp32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    unit_q, unit_k = (F.normalize(x.to(wide), dim=-1) for x in (q, k))
    soft = F.softplus(decay.to(wide) + shift.to(wide)[:, None, None])
    log = -rate.to(wide).exp()[:, None, None] * soft
    k_BHSD, v_BHSD = (per_query_head(x, q) for x in (unit_k, v.to(wide)))
    return unit_q * score_scale(scale, q), k_BHSD, v_BHSD, beta.to(wide).sigmoid(), log


class _Delta(torch.autograd.Function):
    """Chunks [B, H, N, C, ...] of what `_prepared` gives, segment by segment. What is formed inside of chunks is formed
    again in the backward; a state is kept for each segment."""

    @staticmethod
    def forward(ctx, q, k, v, b, log, documents):
        outs, lefts = [], []
        state: Tensor | None = None
        with exactly(q):
            for part in _parts(q):
                here = _Segment.of(part, q, k, v, b, log, documents)
                lefts.append(state)
                states, written, state = here.carried(state)
                outs.append((here.q * here.enter) @ states + here.weights @ written)
        ctx.save_for_backward(q, k, v, b, log, documents, *lefts)
        return torch.cat(outs, 2)

    @staticmethod
    def backward(ctx, d_out):
        *given, documents = ctx.saved_tensors[:6]
        lefts, parts, found = ctx.saved_tensors[6:], _parts(d_out), []
        d_state: Tensor | None = None
        with exactly(d_out):
            for part, state in zip(reversed(parts), reversed(lefts), strict=True):
                here = _Segment.of(part, *given, documents)
                gradients, d_state = here.gradients(d_out[:, :, part], state, d_state)
                found.append(gradients)
        return *(torch.cat(x[::-1], 2) for x in zip(*found, strict=True)), None


def _parts(x: Tensor) -> list[slice]:
    return segments(x.shape[2], x[:, :, 0].numel(), x.device)


class _Segment(NamedTuple):
    """Some chunks.

    Attributes:
        q, k, v, b: see `_prepared`.
        enter, leave, through: see `scan.edges`.
        decays: of each token between it and an earlier one, [..., C, C]; 0 where it sees it not.
        weights: products of queries and keys, decayed.
        overlaps: products of keys and earlier keys, decayed.
        values: what tokens would write into an empty state.
        reads: keys by which a state lessens that.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    b: Tensor
    enter: Tensor
    leave: Tensor
    through: Tensor
    decays: Tensor
    weights: Tensor
    overlaps: Tensor
    values: Tensor
    reads: Tensor

    @classmethod
    def of(cls, part: slice, *given: Any) -> _Segment:
        q, k, v, b, log = (x[:, :, part] for x in given[:-1])
        chunk = q.shape[3]
        within, *sides = Ties(chunk, q.device, True, given[-1]).of(part)
        enter, _, through = edges(log.cumsum(-2), *sides)
        # Between two tokens: summed for each pair, for a difference of sums from the chunk's start would keep few
        # digits after a token that forgets all.
        between = log.expand(*log.shape[:-1], chunk).tril(-1).cumsum(-2)
        leave = scaled(between[..., -1, :, None].exp(), sides[1])
        assert within is not None
        decays = between.masked_fill(~within, -torch.inf).exp()
        overlaps = (k @ k.mT * decays).tril(-1)
        # The diagonal is not read: it is taken for ones.
        right = torch.cat([b * v, b * enter * k], -1)
        solved = torch.linalg.solve_triangular(b * overlaps, right, upper=False, unitriangular=True)
        values, reads = solved.split(v.shape[-1], -1)
        return cls(q, k, v, b, enter, leave, through, decays, q @ k.mT * decays, overlaps, values, reads)

    def carried(self, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """States [B, H, N, D, D] that reach each chunk, what its tokens write [B, H, N, C, D], and the last state."""
        gives = self.k * self.leave
        if state is None:
            state = torch.zeros_like(gives[:, :, 0].mT @ self.values[:, :, 0])
        states, written = [], []
        for value, read, give, kept in zip(
            *(x.unbind(2) for x in (self.values, self.reads, gives, self.through)), strict=True
        ):
            states.append(state)
            written.append(value - read @ state)
            state = kept * state + give.mT @ written[-1]
        return torch.stack(states, 2), torch.stack(written, 2), state

    def carried_back(self, d: Tensor, d_state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the states that leave each chunk, of what its tokens write, and of the first state."""
        by_state, by_weights = (self.q * self.enter).mT @ d, self.weights.mT @ d
        d_state = torch.zeros_like(by_state[:, :, 0]) if d_state is None else d_state
        d_states, d_written = [], []
        rows = (by_state, by_weights, self.reads, self.k * self.leave, self.through)
        for added, write, read, give, kept in reversed(list(zip(*(x.unbind(2) for x in rows), strict=True))):
            d_states.append(d_state)
            d_written.append(write + give @ d_state)
            d_state = kept * d_state + added - read.mT @ d_written[-1]
        return torch.stack(d_states[::-1], 2), torch.stack(d_written[::-1], 2), d_state

    def gradients(self, d: Tensor, state: Tensor | None, d_state: Tensor | None) -> tuple[Any, Tensor]:
        """Gradients of q, k, v, b and logarithms of decays, and of the state that reaches the segment."""
        q, k, v, b, enter = self.q, self.k, self.v, self.b, self.enter
        states, written, _ = self.carried(state)
        d_states, d_written, d_state = self.carried_back(d, d_state)
        # written = (1 + b overlaps)^-1 b (v - enter k S)
        system = (b * self.overlaps).mT
        d_right = torch.linalg.solve_triangular(system, d_written, upper=True, unitriangular=True)
        found, dv = k @ states, b * d_right
        d_system = -(d_right @ written.mT)
        db = (d_right * (v - enter * found)).sum(-1, True) + (d_system * self.overlaps).sum(-1, True)
        d_overlaps, d_weights = b * d_system.tril(-1), d @ written.mT
        by_keys, by_queries = d_overlaps * self.decays, d_weights * self.decays
        asked, handed = d @ states.mT, written @ d_states.mT
        dq = by_queries @ k + asked * enter
        dk = (by_keys + by_keys.mT) @ k + by_queries.mT @ q + handed * self.leave - (dv * enter) @ states.mT
        # Decays: between two tokens, from the chunk's start to a token, from a token to its end, through it.
        d_between = d_overlaps * self.overlaps + d_weights * self.weights
        d_between[..., -1, :] += ((handed * k).sum(-1, True) * self.leave).squeeze(-1)
        d_total = ((asked * q).sum(-1, True) - (dv * found).sum(-1, True)) * enter
        d_total[..., -1, :] += (states * d_states).sum((-1, -2))[..., None] * self.through[..., 0]
        d_log = _summed_back(d_between).tril(-1).sum(-1, True) + _summed_back(d_total)
        return (dq, dk, dv, db, d_log), d_state


def _summed_back(x: Tensor) -> Tensor:
    """Sums over tokens from each on to the chunk's last."""
    return x.flip(-2).cumsum(-2).flip(-2)
