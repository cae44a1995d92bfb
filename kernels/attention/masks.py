"""Mask descriptions: what may be seen, said without building a matrix; a kernel lowers what it needs.

Shapes: B batch, S sequence, Q queries, K keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Mask(NamedTuple):
    """Which keys a query sees: those that all given conditions allow.

    Attributes:
        causal: only keys at its own position and before.
        documents: int [B, S], only keys of its own document; None does not separate documents.
    """

    causal: bool = True
    documents: Tensor | None = None


_ALL = slice(None)


def lower(
    mask: Mask, length: int, device: torch.device, queries: slice = _ALL, keys: slice = _ALL
) -> Tensor | None:
    """The mask as bool [1 or B, 1, Q, K], true where a query sees a key; None if everything is seen.

    Args:
        mask: the description.
        length: tokens in the sequence.
        queries, keys: the rows and columns that are wanted, all by default.
    """
    seen = None
    if mask.causal:
        place = torch.arange(length, device=device)
        seen = (place[queries, None] >= place[keys])[None, None]
    if mask.documents is not None:
        same = (mask.documents[:, queries, None] == mask.documents[:, None, keys])[:, None]
        seen = same if seen is None else seen & same
    return seen
