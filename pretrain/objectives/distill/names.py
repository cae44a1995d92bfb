"""How what a teacher gives is called in a batch.

All are tensors whose first dim is the sample; where they have a sequence, it is the second. They stand in the batch
at the student's layout: the rows, columns and heads that are here.

Shapes: B batch, S sequence, H the teacher's heads, D their width, E hidden size, R distances, k words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from torch import Tensor

What = Literal["q", "k", "bias", "queries", "keys", "values", "inputs", "states"]

PREFIX = "taught."
FINAL = "taught.final"
"""Last hidden states, as the head reads them, [B, S, E]."""
LOGITS = "taught.logits"
"""Of classifiers, [B, classes]; of words, the likeliest k at every place, [B, S, k], and
`WORDS` their numbers, `REST` the log-sum-exp of all of a place's logits over the temperature, [B, S]."""
WORDS = "taught.words"
REST = "taught.rest"
OTHERS = "taught.others"
"""Representations of all samples of the global batch in their order, the same for every row, [B, samples, E]."""
LAST = "taught.last"
"""Last hidden states as the model gives them, [B, S, E]."""


class Target(NamedTuple):
    """What is wanted of a layer of the teacher.

    Attributes:
        tower: which of its towers.
        layer: use of a block, from 0.
        what: `q` and `k` that scores are made of [B, S, H, D] and their `bias` by distance [B, R, H], of the heads
            that the student's heads learn from, in their order (keys once for every query head); `queries`, `keys`
            and `values` that are related [B, S, heads of their own, D]; `inputs` and `states`, the residual stream
            before and after the block [B, S, E].
        across: of cross-attention.
    """

    tower: int
    layer: int
    what: What
    across: bool = False

    @property
    def name(self) -> str:
        return f"{PREFIX}{self.tower}.{self.layer}.{'across_' if self.across else ''}{self.what}"


def taught(batch: Mapping[str, Tensor]) -> bool:
    """Whether a batch has a teacher's soft targets of words."""
    return FINAL in batch or WORDS in batch
