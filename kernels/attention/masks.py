"""Mask descriptions: what may be seen, said without building a matrix; a kernel lowers what it needs.

Shapes: B batch, Q queries, K keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Mask(NamedTuple):
    """Which keys a query sees: those that all given conditions allow.

    Padding is a document of its own, with id -1, so that in self-attention every query sees at least itself. In
    cross-attention a query may see nothing: its output is 0, and its gradients are.

    Attributes:
        causal: only keys at its own place and before; queries and keys are then as many.
        documents: int [B, Q], only keys of its own document; None does not separate documents.
        key_documents: int [B, K], the keys' documents where they are not the queries'; needs `documents`.
        prefix: int64 [B], with `causal`: keys at places before prefix[b] are seen by all queries of row b (prefix
            LM, Raffel et al. 2020, section 3.2.1), as far as `documents` allows.
    """

    causal: bool = True
    documents: Tensor | None = None
    key_documents: Tensor | None = None
    prefix: Tensor | None = None

    @property
    def triangular(self) -> bool:
        """Whether no query sees a key after it, so that a kernel may skip those."""
        return self.causal and self.prefix is None


_ALL = slice(None)


def lower(
    mask: Mask,
    queries: int,
    keys: int,
    device: torch.device,
    query_slice: slice = _ALL,
    key_slice: slice = _ALL,
) -> Tensor | None:
    """The mask as bool [1 or B, 1, Q, K], true where a query sees a key; None if everything is seen.

    Args:
        mask: the description.
        queries, keys: how many there are; equal for a causal mask.
        query_slice, key_slice: the rows and columns that are wanted, all by default.
    """
    assert not mask.causal or queries == keys, "a causal mask needs as many queries as keys"
    seen = None
    if mask.causal:
        place = torch.arange(queries, device=device)
        seen = (place[query_slice, None] >= place[key_slice])[None, None]
        if mask.prefix is not None:
            seen = seen | (place[key_slice] < mask.prefix[:, None])[:, None, None]
    if mask.documents is not None:
        theirs = mask.documents if mask.key_documents is None else mask.key_documents
        same = (mask.documents[:, query_slice, None] == theirs[:, None, key_slice])[:, None]
        seen = same if seen is None else seen & same
    else:
        assert mask.key_documents is None, "documents of keys need documents of queries"
    return seen
