"""Attention composed of a score, a weighting and a scope: the specification of every such mechanism, and its kernels.

Shapes: B batch, H query heads, K key/value heads (in [H, Q, K]: keys), Q queries, S keys, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headway.kernels import random
from headway.kernels.attention import blocks, chunks, cpp, flex, rows, triton
from headway.kernels.attention.dense import WeightDropout, per_query_head, score_scale
from headway.kernels.attention.masks import Mask, lower
from headway.kernels.attention.scopes import Scope
from headway.kernels.attention.scores import DOT_PRODUCT, Extras, Score
from headway.kernels.attention.slopes import Bias, Slopes, block_of
from headway.kernels.attention.weights import SOFTMAX, Weighting


class Form(NamedTuple):
    """What words say together.

    Attributes:
        score, weighting: how keys are scored and weighed.
        own: name of the weighting's own parameter [H], if it has one.
        scope: (settings by name) -> which places are seen; None sees all.
    """

    score: Score = DOT_PRODUCT
    weighting: Weighting = SOFTMAX
    own: str | None = None
    scope: Callable[[Mapping[str, Any]], Scope] | None = None

    def narrowed(self, mask: Mask, x: Extras) -> Mask:
        """The mask with the scope."""
        return mask if self.scope is None else mask._replace(scope=self.scope(x))

    def reference(
        self,
        q_BHQD: Tensor,
        k_BKSD: Tensor,
        v_BKSD: Tensor,
        mask: Mask,
        dropout: WeightDropout | None = None,
        scale: float | None = None,
        bias_HQK: Bias | None = None,
        **x: Any,
    ) -> Tensor:
        """The specification, O(Q S) in memory; returns [B, H, Q, D]. Arguments: see `dense.reference`; `x`: settings
        and own parameters by name."""
        mask = self.narrowed(mask, x)
        *operands, scale = self.score.prepare(q_BHQD, k_BKSD, v_BKSD, score_scale(scale, q_BHQD), x)
        weights, values = self.weigh(operands[0], operands[1], mask, scale, bias_HQK, x), operands[2]
        if dropout is not None:
            kept = dropout.kept(weights.shape[1], slice(None), slice(0, values.shape[2]))
            weights = torch.where(kept, weights * random.kept_scale(dropout.p), 0)
        return self.score.finish(weights.to(values.dtype) @ per_query_head(values, weights), x)

    def weigh(
        self, q: Tensor, k: Tensor, mask: Mask, scale: float, bias_HQK: Bias | None, x: Extras
    ) -> Tensor:
        """Weights of prepared operands [B, H, Q, S], in fp32 or wider, before dropout."""
        scores = self.score.compute(q, k, scale, x)
        if bias_HQK is not None:
            scores = scores + block_of(bias_HQK)
        if self.weighting.draws:
            every = slice(0, q.shape[0]), slice(0, q.shape[1]), slice(0, q.shape[2])
            noise = x["draw"].gumbel(*every, torch.arange(k.shape[2], device=k.device))
            scores = scores if noise is None else scores + noise.to(scores.dtype)
            scores = scores / x.get("temperature", 1.0)
        seen = lower(mask, q.shape[2], k.shape[2], q.device)
        own = None if self.own is None else x[self.own]
        return self.score.mix(weigh(self.weighting, scores, seen, own), x)

    def weights(
        self,
        q_BHQD: Tensor,
        k_BKSD: Tensor,
        mask: Mask,
        scale: float | None = None,
        bias_HQK: Bias | None = None,
        **x: Any,
    ) -> Tensor:
        """Attention weights [B, H, Q, S] for maps; of differential attention, of both maps."""
        q, k, _, factor = self.score.prepare(q_BHQD, k_BKSD, k_BKSD, score_scale(scale, q_BHQD), x)
        return self.weigh(q, k, self.narrowed(mask, x), factor, bias_HQK, x)

    def by(self, kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A kernel of scaled dot products and softmax, given what `prepare` makes."""

        def compute(q, k, v, mask, dropout=None, scale=None, bias=None, **x):
            q, k, v, factor = self.score.prepare(q, k, v, score_scale(scale, q), x)
            return self.score.finish(kernel(q, k, v, self.narrowed(mask, x), dropout, factor, bias), x)

        return compute

    def in_blocks(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask,
        dropout: WeightDropout | None = None,
        scale: float | None = None,
        bias: Bias | None = None,
        **x: Any,
    ) -> Tensor:
        """Row blocks: memory grows with the length."""
        q, k, v, factor = self.score.prepare(q, k, v, score_scale(scale, q), x)
        mask = self.narrowed(mask, x)
        if self.fused and self.score.even and mask.strip:
            out = blocks.attention(q, k, v, mask, dropout, factor, bias)
        elif self.score.rows:
            settled = x.get("softcap"), x.get("temperature", 1.0), x.get("draw")
            task = rows.Task(self.weighting, mask, dropout, factor, *settled)
            out = rows.attention(task, q, k, v, bias, None if self.own is None else x[self.own])
        else:
            out = chunks.attention(self, q, k, v, mask, dropout, factor, bias, x)
        return self.score.finish(out, x)

    def in_cpp(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask,
        dropout: WeightDropout | None = None,
        scale: float | None = None,
        bias: Bias | None = None,
        **x: Any,
    ) -> Tensor:
        """The C++ kernel of CPUs."""
        q, k, v, factor = self.score.prepare(q, k, v, score_scale(scale, q), x)
        own, mask = None if self.own is None else x[self.own], self.narrowed(mask, x)
        if mask.scope is None or (mask.scope.phases() == (mask.scope,) and not mask.scope.scattered):
            out = cpp.attention(q, k, v, mask, dropout, factor, bias, x.get("softcap"), own)
        else:
            task = rows.Task(self.weighting, mask, dropout, factor, x.get("softcap"), tiles=True)
            out = rows.attention(task, q, k, v, bias, own)
        return self.score.finish(out, x)

    def flex(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask,
        dropout: WeightDropout | None = None,
        scale: float | None = None,
        bias: Bias | None = None,
        **x: Any,
    ) -> Tensor:
        """PyTorch's FlexAttention, without dropout and without a bias that learns."""
        assert dropout is None
        assert bias is None or isinstance(bias, Slopes)
        q, k, v, factor = self.score.prepare(q, k, v, score_scale(scale, q), x)
        sink = None if self.own is None else x[self.own]
        mask = self.narrowed(mask, x)
        return self.score.finish(flex.attention(q, k, v, mask, factor, bias, x.get("softcap"), sink), x)

    def in_triton(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask,
        dropout: WeightDropout | None = None,
        scale: float | None = None,
        bias: Bias | None = None,
        **x: Any,
    ) -> Tensor:
        """Triton's kernels, on GPUs."""
        q, k, v, factor = self.score.prepare(q, k, v, score_scale(scale, q), x)
        own, mask = None if self.own is None else x[self.own], self.narrowed(mask, x)
        if isinstance(self.weighting, triton.SPARSE):
            assert bias is None
            out = triton.sparse(q, k, v, mask, self.weighting, dropout, factor)
        else:
            cap = x.get("softcap")
            out = triton.attention(q, k, v, mask, dropout, factor, bias, softcap=cap, sink=own)
        return self.score.finish(out, x)

    @property
    def flexible(self) -> bool:
        """Whether FlexAttention computes it: softmax, with a sink or without, of products, with a cap or without."""
        return self.score.rows and self.weighting.merges

    @property
    def sparse(self) -> bool:
        """Whether Triton's kernels of sparse weights compute it."""
        return self.score.product and self.score.even and isinstance(self.weighting, triton.SPARSE)

    @property
    def fused(self) -> bool:
        """Whether kernels of scaled dot products and softmax compute it."""
        return self.score.product and self.weighting is SOFTMAX


def weigh(weighting: Weighting, scores: Tensor, seen: Tensor | None, own_H: Tensor | None) -> Tensor:
    """Weights of scores [B, H, Q, S] where a query sees a key, 0 elsewhere, differentiable."""
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return _Weigh.apply(scores, own_H, weighting)


class _Weigh(torch.autograd.Function):
    """Weights by threshold, their gradient by the weighting's own rule: one through Newton's steps would be wrong."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, own_H: Tensor | None, weighting: Weighting) -> Tensor:
        threshold = weighting.threshold(scores, own_H)
        threshold = torch.where(threshold == -torch.inf, torch.inf, threshold)  # rows that see nothing
        weights = weighting.weigh_(scores.clone(), threshold)
        ctx.save_for_backward(weights, threshold, own_H)
        ctx.weighting = weighting
        return weighting.used(weights)

    @staticmethod
    def backward(ctx: Any, d_weights: Tensor) -> Any:
        weights, threshold, own_H = ctx.saved_tensors
        delta, d_own = (weights * d_weights).sum(-1), None
        if own_H is not None:  # a sink takes what the weights leave
            share = (own_H.unsqueeze(-1).to(threshold.dtype) - threshold).exp()
            d_own = -(share * delta).sum((0, 2)).to(own_H.dtype)
        return ctx.weighting.pull_(weights, d_weights.clone(), delta), d_own, None
