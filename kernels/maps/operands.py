"""What kernels of attention-map distillation are given: two models' scores, and which pairs count.

Shapes: B batch, H query heads, K key/value heads (in [H, Q, K]: keys), Q queries, S keys, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from headway.kernels.attention.blocks import block_rows
from headway.kernels.attention.masks import Mask, lower
from headway.kernels.attention.slopes import Fixed

_ALL = slice(None)


class Scores(NamedTuple):
    """A model's scores, scale q k^T + bias, not yet computed.

    Attributes:
        q: [B, H, Q, D].
        k: [B, K, S, D], where query head h reads key head h // (H / K).
        scale: factor of the products.
        bias: [H, Q, K], or what describes it; finite.
    """

    q: Tensor
    k: Tensor
    scale: float
    bias: Fixed | None = None


class Seen(NamedTuple):
    """Which keys a row sees: those that both allow.

    Attributes:
        mask: the description.
        pairs: bool [1 or B, 1, Q, S], often with strides of 0; None allows all.
    """

    mask: Mask
    pairs: Tensor | None = None

    def block(self, scores: Scores, queries: slice = _ALL, keys: slice = _ALL) -> Tensor | None:
        """Of some rows and keys, bool [1 or B, 1, Q, K]; None if everything is seen."""
        q, k = scores.q, scores.k
        seen = lower(self.mask, q.shape[2], k.shape[2], q.device, queries, keys)
        if self.pairs is None:
            return seen
        pairs = self.pairs[:, :, queries, keys]
        return pairs if seen is None else seen & pairs

    def of(self, samples: slice) -> Seen:
        """Of some samples."""
        tensors = "documents", "key_documents", "prefix"
        found = {name: value[samples] for name in tensors if (value := getattr(self.mask, name)) is not None}
        pairs = self.pairs if self.pairs is None or len(self.pairs) == 1 else self.pairs[samples]
        return Seen(self.mask._replace(**found), pairs)

    def sure(self, queries: slice, keys: slice) -> int:
        """How many of the first of these keys are known to be seen by all of these rows."""
        only = self.mask.triangular and self.mask.documents is None and self.mask.scope is None
        return queries.start if only and self.pairs is None and keys.start == 0 else 0

    def rows(self, scores: Scores) -> Tensor | None:
        """The rows that count, bool [B, Q]: those that see a key and are no padding (a document below 0); None if all
        do."""
        q, k, mask = scores.q, scores.k, self.mask
        uneven = mask.scope is not None and q.shape[2] != k.shape[2]
        if mask.documents is None and self.pairs is None and not mask.may_hide_all and not uneven:
            return None
        some = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
        if self.pairs is not None or mask.may_hide_all or uneven:
            for start in range(0, q.shape[2], block_rows(q.shape[2])):
                queries = slice(start, min(q.shape[2], start + block_rows(q.shape[2])))
                seen = self.block(scores, queries, mask.keys_of(queries, k.shape[2]))
                if seen is not None:
                    some[:, queries] = seen.any(-1)[:, 0]
        return some if mask.documents is None else some & (mask.documents >= 0)


Sums = Callable[[Scores, Scores, str, Seen, Tensor | None], Tensor]
"""(teacher, student, loss, seen, rows) -> loss [B], in fp32 or wider: the sum over a sample's rows of the mean over the
student's heads of the row's loss. What every kernel of map distillation is.

The teacher's tensors are detached, and have G times as many query heads as the student's, G >= 1; its head dimension
and its key heads may be others. `loss` is a word of `divergences.DIVERGENCES`. `seen.mask.split` is None. `rows`: those
that count, bool [B, Q], see `Seen.rows`; None if all do; others give 0, and zero gradients. Differentiable in the
student's `q`, `k`, and in its `bias` if that is a tensor. The operands are checked before.
"""
