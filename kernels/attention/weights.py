"""Weightings: from a query's scores to the weights of its keys.

A weighting finds a number for every row (its log-partition, its threshold), from which and the score alone a weight
follows. So a kernel may save that number, recompute weights in the backward, and hold no matrix.

Shapes: R rows (any leading dims), K keys, H query heads.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Weighting:
    """Softmax, and the base of the others. Scores that are not seen are -inf; a row that sees nothing weighs 0.

    Attributes:
        merges: whether rows whose keys come in parts can be merged by their log-sum-exp.
        draws: whether scores are perturbed at random, and divided by a temperature, before they are weighed.
        scored: whether scores learn by the log-probability of what was drawn (`reinforce`), not by back-propagation.
    """

    merges = True
    draws = False
    scored = False

    def threshold(self, scores_RK: Tensor, own_H: Tensor | None = None) -> Tensor:
        """What a row's weights need beside its scores, [R]: the log-sum-exp."""
        return scores_RK.logsumexp(-1)

    def weigh_(self, scores_RK: Tensor, threshold_R: Tensor) -> Tensor:
        """Weights [R, K], 0 where the score is -inf, in place of the scores. Thresholds of rows that see nothing are
        +inf."""
        return scores_RK.sub_(threshold_R.unsqueeze(-1)).exp_()

    def used(self, weights_RK: Tensor) -> Tensor:
        """The weights that values meet; gradients are those of `weigh_` all the same."""
        return weights_RK

    def pull_(self, weights_RK: Tensor, d_weights_RK: Tensor, delta_R: Tensor) -> Tensor:
        """Gradient of the scores, in place of that of the weights.

        Args:
            delta_R: sums of weights times their gradients.
        """
        return d_weights_RK.sub_(delta_R.unsqueeze(-1)).mul_(weights_RK)


class Sink(Weighting):
    """Softmax with one more key of a learned score and no value, a sink for what wants no key (gpt-oss; Miller 2023,
    softmax-plus-one is a sink of score 0)."""

    def threshold(self, scores_RK: Tensor, own_H: Tensor | None = None) -> Tensor:
        assert own_H is not None
        return torch.logaddexp(scores_RK.logsumexp(-1), own_H.unsqueeze(-1).to(scores_RK.dtype))


class Sigmoid(Weighting):
    """sigmoid(score - log n), n keys seen (Ramapuram et al. 2024, section 3: n is the length of the sequence; here what
    the query sees, so that padding and packing change nothing)."""

    merges = False

    def threshold(self, scores_RK: Tensor, own_H: Tensor | None = None) -> Tensor:
        return (scores_RK > -torch.inf).sum(-1).clamp(min=1).to(scores_RK.dtype).log()

    def weigh_(self, scores_RK: Tensor, threshold_R: Tensor) -> Tensor:
        return scores_RK.sub_(threshold_R.unsqueeze(-1)).sigmoid_()

    def pull_(self, weights_RK: Tensor, d_weights_RK: Tensor, delta_R: Tensor) -> Tensor:
        return d_weights_RK.mul_(weights_RK).mul_(1 - weights_RK)


class Sparsemax(Weighting):
    """Euclidean projection of the scores onto the simplex (Martins and Astudillo 2016): max(score - t, 0), sum 1."""

    merges = False

    def threshold(self, scores_RK: Tensor, own_H: Tensor | None = None) -> Tensor:
        return _newton(scores_RK, 1)

    def weigh_(self, scores_RK: Tensor, threshold_R: Tensor) -> Tensor:
        return scores_RK.sub_(threshold_R.unsqueeze(-1)).clamp_(min=0)

    def pull_(self, weights_RK: Tensor, d_weights_RK: Tensor, delta_R: Tensor) -> Tensor:
        support = weights_RK > 0
        d_weights_RK.mul_(support)
        mean = d_weights_RK.sum(-1, keepdim=True).div_(support.sum(-1, keepdim=True).clamp_(min=1))
        return d_weights_RK.sub_(mean).mul_(support)


class Entmax15(Weighting):
    """1.5-entmax (Peters et al. 2019, section 3): max(score / 2 - t, 0)^2, sum 1; between softmax and sparsemax."""

    merges = False

    def threshold(self, scores_RK: Tensor, own_H: Tensor | None = None) -> Tensor:
        return _newton(scores_RK / 2, 2)

    def weigh_(self, scores_RK: Tensor, threshold_R: Tensor) -> Tensor:
        return scores_RK.div_(2).sub_(threshold_R.unsqueeze(-1)).clamp_(min=0).square_()

    def pull_(self, weights_RK: Tensor, d_weights_RK: Tensor, delta_R: Tensor) -> Tensor:
        slope = weights_RK.sqrt()
        d_scores = d_weights_RK.mul_(slope)
        total = slope.sum(-1, keepdim=True)
        mean = d_scores.sum(-1, keepdim=True) / torch.where(total > 0, total, 1)
        return d_scores.sub_(slope.mul_(mean))


class Hard(Weighting):
    """One key, drawn from the softmax, by the Gumbel-max trick; gradients are those of the relaxed choice, softmax of
    (scores + Gumbel noise) / temperature (straight-through; Jang et al. 2017, section 2.2). Without noise, the best."""

    merges = False
    draws = True

    def used(self, weights_RK: Tensor) -> Tensor:
        best = weights_RK.argmax(-1, keepdim=True)
        one = torch.zeros_like(weights_RK).scatter_(-1, best, 1)
        return one.mul_(weights_RK > 0)  # rows that see nothing choose nothing

    def pull_(self, weights_RK: Tensor, d_weights_RK: Tensor, delta_R: Tensor) -> Tensor:
        delta = (weights_RK * d_weights_RK).sum(-1)  # not of what was used
        return super().pull_(weights_RK, d_weights_RK, delta)


class Reinforced(Hard):
    """One key, drawn as `Hard` does; back-propagation gives the scores nothing (Xu et al. 2015, section 4.1)."""

    scored = True

    def pull_(self, weights_RK: Tensor, d_weights_RK: Tensor, delta_R: Tensor) -> Tensor:
        return d_weights_RK.zero_()


@torch.no_grad()
def _newton(scores_RK: Tensor, power: int) -> Tensor:
    """t with sum max(score - t, 0)^power = 1, [R]; +inf where nothing is seen.

    The sum is convex and falls in t, so Newton's steps from a t that is too small never pass the root: for power 1 they
    find it exactly, once the support is that of the root (Michelot 1986), for power 2 they converge quadratically. No
    sort is needed. The largest score less 1 is too small: its own term is 1.
    """
    t = scores_RK.amax(-1, keepdim=True) - 1
    t = torch.where(t == -torch.inf, torch.inf, t)
    tolerance = 4 * torch.finfo(scores_RK.dtype).eps
    for _ in range(_MOST_STEPS):
        above = (scores_RK - t).clamp_(min=0)
        slope = (above > 0).sum(-1, keepdim=True) if power == 1 else 2 * above.sum(-1, keepdim=True)
        value = above.sum(-1, keepdim=True) if power == 1 else above.square_().sum(-1, keepdim=True)
        step = torch.where(slope > 0, (value - 1) / slope, 0)
        t = t + step
        if not torch.compiler.is_compiling() and bool((step.abs() <= tolerance * (1 + t.abs())).all()):
            break
    return t.squeeze(-1)


_MOST_STEPS = 20
"""Of Newton's method: rows of 32,768 normal scores of deviation 1 take 9, of deviation 8 take 6."""

SOFTMAX = Weighting()
