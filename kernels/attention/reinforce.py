"""Attention to one key that is drawn, and the log-probability of what was drawn, for training by the score function.

REINFORCE (Williams 1992) for attention that is a choice (Mnih et al. 2014, equation 2; Xu et al. 2015, section 4.1).
Scores get no gradient from what the drawn value leads to, which is no smooth function of them. Whoever knows the loss
weighs the gradient of the log-probability by it, as grad E[loss] = E[grad loss + loss grad log p].

log p = s_j - logsumexp(s), j drawn, so d log p / d s = [j] - softmax(s): the backward computes the scores again, block
by block, and memory grows with the length. Values are those that were drawn, and get their gradient as any others.

Shapes: B batch, H query heads, K key/value heads (in [H, Q, K]: keys), Q queries, S keys, D head dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from headway.kernels.attention.dense import per_query_head, score_scale
from headway.kernels.attention.draw import Draw
from headway.kernels.attention.masks import Mask, lower
from headway.kernels.attention.rows import Operands, Piece, Task, pieces, pull_scores, scores_of
from headway.kernels.attention.slopes import Bias, Slopes, block_of, learned

if TYPE_CHECKING:
    from headway.kernels.attention.compose import Form


class Drawn(NamedTuple):
    """What one forward has drawn.

    Attributes:
        out: [B, H, Q, D], the values of the keys drawn; 0 of a query that sees nothing.
        log_probability: [B, H, Q] in fp32 or wider, differentiable by queries, keys and bias; 0 of a query that sees
            nothing.
    """

    out: Tensor
    log_probability: Tensor


def reference(
    form: Form,
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    scale: float | None = None,
    bias_HQK: Bias | None = None,
    **x: Any,
) -> Drawn:
    """The specification, O(Q S) in memory. Arguments: see `compose.Form.reference`; `x` has `draw`."""
    q, k, v, factor = form.score.prepare(q_BHQD, k_BKSD, v_BKSD, score_scale(scale, q_BHQD), x)
    scores = form.score.compute(q, k, factor, x)
    if bias_HQK is not None:
        scores = scores + block_of(bias_HQK)
    seen = lower(form.narrowed(mask, x), q.shape[2], k.shape[2], q.device)
    some = scores.new_ones(1, 1, 1, dtype=torch.bool)
    if seen is not None:
        scores, some = scores.masked_fill(~seen, torch.finfo(scores.dtype).min), seen.any(-1)
    every = tuple(slice(0, size) for size in q.shape[:3])
    noise = x["draw"].gumbel(*every, torch.arange(k.shape[2], device=k.device))
    noisy = scores.detach() if noise is None else scores.detach() + noise.to(scores.dtype)
    chosen_BHQ = noisy.argmax(-1)
    log_BHQ = torch.log_softmax(scores, -1).gather(-1, chosen_BHQ[..., None]).squeeze(-1)
    return Drawn(form.score.finish(_values(v, q, chosen_BHQ, some), x), torch.where(some, log_BHQ, 0))


@torch.compiler.disable
def in_blocks(
    form: Form,
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    scale: float | None = None,
    bias_HQK: Bias | None = None,
    **x: Any,
) -> Drawn:
    """The same in blocks of queries: memory grows with the length."""
    q, k, v, factor = form.score.prepare(q_BHQD, k_BKSD, v_BKSD, score_scale(scale, q_BHQD), x)
    slopes = bias_HQK if isinstance(bias_HQK, Slopes) else None
    task = Task(form.weighting, form.narrowed(mask, x), None, factor, x.get("softcap"), slopes=slopes)
    given = q, per_query_head(k, q), learned(bias_HQK)
    log_BHQ, chosen_BHQ, some_BHQ = _LogProbability.apply(task, x["draw"], *given)
    return Drawn(form.score.finish(_values(v, q, chosen_BHQ, some_BHQ), x), log_BHQ)


def _values(v_BKSD: Tensor, q_BHQD: Tensor, chosen_BHQ: Tensor, some_BHQ: Tensor) -> Tensor:
    """Values of the keys chosen, [B, H, Q, D], where there is some key to choose."""
    v_BHSD = per_query_head(v_BKSD, q_BHQD)
    index = chosen_BHQ[..., None].expand(*chosen_BHQ.shape, v_BHSD.shape[-1])
    return torch.where(some_BHQ[..., None], v_BHSD.gather(2, index), 0)


class _LogProbability(torch.autograd.Function):
    """Log-probabilities of what is drawn, which keys these are, and whether there was any, all [B, H, Q]."""

    @staticmethod
    def forward(ctx: Any, task: Task, draw: Draw, q: Tensor, k: Tensor, bias: Tensor | None) -> Any:
        x = Operands(q, k, k, bias, None)  # values take no part
        shape = q.shape[:3]
        log, lse = (torch.zeros(shape, dtype=x.wide, device=q.device) for _ in range(2))
        chosen = torch.zeros(shape, dtype=torch.int64, device=q.device)
        for piece in pieces(task, x):
            scores = scores_of(task, x, piece)[0]
            numbers = piece.part.numbers.to(q.device)
            noise = draw.gumbel(piece.rows, piece.heads, piece.part.queries, numbers)
            best = (scores if noise is None else scores + noise.to(scores.dtype)).argmax(-1)
            total = scores.logsumexp(-1)
            piece.queries(log).copy_(scores.gather(-1, best[..., None]).squeeze(-1) - total)
            piece.queries(lse).copy_(total)
            piece.queries(chosen).copy_(numbers[best])
        some = lse > -torch.inf
        ctx.save_for_backward(q, k, bias, lse.masked_fill_(~some, torch.inf), chosen)
        ctx.task = task
        ctx.mark_non_differentiable(chosen, some)
        return log.masked_fill_(~some, 0), chosen, some

    @staticmethod
    def backward(ctx: Any, d_log: Tensor, *_: Any) -> Any:
        q, k, bias, lse, chosen = ctx.saved_tensors
        x = Operands(q, k, k, bias, None)
        total = {
            name: torch.zeros_like(value, dtype=x.wide)
            for name, value in (("q", q), ("k", k), ("bias", bias))
            if value is not None
        }
        d_log = d_log.masked_fill(lse == torch.inf, 0)
        for piece in pieces(ctx.task, x):
            _pull(ctx.task, x, piece, lse, chosen, d_log, total)
        found = [total["q"].to(q.dtype), total["k"].to(k.dtype)]
        return None, None, *found, None if bias is None else total["bias"].to(bias.dtype)


def _pull(
    task: Task,
    x: Operands,
    piece: Piece,
    lse: Tensor,
    chosen: Tensor,
    d_log: Tensor,
    total: dict[str, Tensor],
) -> None:
    """Add a piece's gradients to the total."""
    scores, bent = scores_of(task, x, piece)
    upstream = piece.queries(d_log)[..., None]
    d_scores = scores.sub_(piece.queries(lse)[..., None]).exp_().mul_(-upstream)
    # Blocks hold keys in order; of queries that see nothing the number means nothing, and 0 is added.
    numbers = piece.part.numbers.to(chosen.device)
    place = torch.searchsorted(numbers, piece.queries(chosen)[..., None].contiguous())
    d_scores.scatter_add_(-1, place.clamp_(max=len(numbers) - 1), upstream.to(d_scores.dtype))
    pull_scores(task, x, piece, d_scores, bent, total)
