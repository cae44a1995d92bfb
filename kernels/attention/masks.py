"""Mask descriptions: what may be seen, said without building a matrix; a kernel lowers what it needs.

Shapes: B batch, Q queries, K keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headway.kernels.attention.scopes import Scope, Window


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
        shift: place of the first key minus place of the first query, where a kernel is given parts of a sequence:
            then `causal` compares places that far apart, a query may see nothing, `prefix` counts from the first
            key, and queries and keys need not be as many. None for whole sequences.
        split: lengths of the sequences of queries and of keys, where queries and keys are only some columns of
            them. All the above then describes the whole sequences; only a core that knows which columns are here
            takes such a mask. None where all columns are here.
        scope: only keys that it sees by their places.
    """

    causal: bool = True
    documents: Tensor | None = None
    key_documents: Tensor | None = None
    prefix: Tensor | None = None
    shift: int | None = None
    split: tuple[int, int] | None = None
    scope: Scope | None = None

    @property
    def triangular(self) -> bool:
        """Whether no query sees a key after it, so that a kernel may skip those."""
        return self.causal and self.prefix is None and self.shift is None

    @property
    def may_hide_all(self) -> bool:
        """Whether a query may see no key at all."""
        return self.key_documents is not None or self.shift is not None

    @property
    def window(self) -> int | None:
        """Width of a sliding window, where the scope is one."""
        return self.scope.width if isinstance(self.scope, Window) else None

    @property
    def strip(self) -> bool:
        """Whether the keys that a block of queries sees by their places are one run of about as many."""
        return self.scope is None or isinstance(self.scope, Window)

    def keys_of(self, queries: slice, keys: int) -> slice:
        """Of so many keys those that a block of queries may see by their places, and at least one."""
        stop = queries.stop if self.triangular else keys
        if self.window is None:
            return slice(0, stop)
        shift = self.shift or 0
        start = min(max(0, queries.start - shift - self.window + 1), keys - 1)
        return slice(start, max(start + 1, min(stop, queries.stop - shift + self.window - 1)))

    def queries_of(self, keys: slice, queries: int, rows: int) -> slice:
        """Of so many queries those that may see a block of keys by their places: whole blocks of `rows`, at least one;
        `keys` begin at a multiple of it if they are as many."""
        start = keys.start if self.triangular else 0
        if self.window is None:
            return slice(start, queries)
        first = keys.start + (self.shift or 0) - self.window + 1
        past = keys.stop + (self.shift or 0) + self.window - 1
        start = min(max(start, first // rows * rows), (queries - 1) // rows * rows)
        return slice(start, min(queries, max(start + rows, -(-past // rows) * rows)))


_ALL = slice(None)


def lower(
    mask: Mask,
    queries: int,
    keys: int,
    device: torch.device,
    query_slice: slice | Tensor = _ALL,
    key_slice: slice | Tensor = _ALL,
) -> Tensor | None:
    """The mask as bool [1 or B, 1, Q, K], true where a query sees a key; None if everything is seen.

    Args:
        mask: the description.
        queries, keys: how many there are; equal for a causal mask.
        query_slice, key_slice: the rows and columns that are wanted, all by default; also by number.
    """
    assert mask.split is None, "columns of a sequence need a core that knows which they are"
    parts = mask.shift is not None
    assert not mask.causal or parts or queries == keys, "a causal mask needs as many queries as keys"
    seen = None
    if mask.causal or mask.scope is not None:
        place = torch.arange(queries, device=device)
        key_place = place if queries == keys else torch.arange(keys, device=device)
        ahead = key_place + mask.shift if mask.shift else key_place
        if mask.causal:
            seen = (place[query_slice, None] >= ahead[key_slice])[None, None]
            if mask.prefix is not None:
                seen = seen | (key_place[key_slice] < mask.prefix[:, None])[:, None, None]
        if mask.scope is not None:
            places = place[query_slice, None], ahead[key_slice][None]
            near = mask.scope.sees(*places, keys, mask.triangular)[None, None]
            seen = near if seen is None else seen & near
    if mask.documents is not None:
        theirs = mask.documents if mask.key_documents is None else mask.key_documents
        same = (mask.documents[:, query_slice, None] == theirs[:, None, key_slice])[:, None]
        seen = same if seen is None else seen & same
    else:
        assert mask.key_documents is None, "documents of keys need documents of queries"
    return seen
