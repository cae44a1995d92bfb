"""Attention's mask, bias and dropout as its Triton kernels take them.

Shapes: B batch, H query heads (in [H, Q, K]: keys), Q queries, S keys, D head dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from headway.kernels import random
from headway.kernels.attention.choose import KernelUnavailable
from headway.kernels.attention.dense import WeightDropout
from headway.kernels.attention.masks import Mask, lower
from headway.kernels.attention.slopes import Distances, Fixed, Slopes
from headway.kernels.triton.attention_tiles import Dropped, Spans
from headway.kernels.triton.map_tiles import Biases, Heads, Seen


class Lowered(NamedTuple):
    """A mask: conditions that kernels check tile by tile, and a tensor of what they do not know."""

    seen: Seen
    spans: Spans | None
    causal: bool


def heads(x_BHSD: Tensor) -> Heads:
    """A tensor [B, H, S, D] whose last dim is dense."""
    x_BHSD = x_BHSD if x_BHSD.stride(-1) == 1 else x_BHSD.contiguous()
    return Heads(x_BHSD, *x_BHSD.stride()[:3])


def common(*xs_BHSD: Tensor) -> int:
    """What all strides and widths are multiples of, for `map_tiles.aligned`: numbers of 16 bytes, or 1."""
    count = 16 // min(x.element_size() for x in xs_BHSD)
    steps = [step for x in xs_BHSD for step in (*x.stride()[:3], x.shape[-1])]
    known = all(step % 16 == 0 for step in steps)
    return 1 if known or any(step % count for step in steps) else count


def biases(bias_HQK: Fixed | None) -> Biases:
    """A bias with its strides: those of a table of distances are of a tensor [H, Q, K] that is not written out; or
    slopes, with places in 32 bits, as `of_samples` has numbers of documents."""
    if bias_HQK is None:
        return Biases(None, 0, 0, 0, None, None, None)
    if isinstance(bias_HQK, Slopes):
        places = (x.to(torch.int32).contiguous() for x in (bias_HQK.queries, bias_HQK.keys))
        return Biases(None, 0, 0, 0, bias_HQK.slopes.contiguous(), *places)
    if isinstance(bias_HQK, Distances):
        table = bias_HQK.table.contiguous()
        return Biases(table.view(-1)[bias_HQK.zero :], table.shape[1], -1, 1, None, None, None)
    head, query, key = bias_HQK.stride()
    return Biases(bias_HQK, head, query, key, None, None, None)


def lowered(mask: Mask, q_BHQD: Tensor, k_BKSD: Tensor) -> Lowered:
    """Causality, documents, a prefix and a window are for kernels; other scopes, and parts of a sequence, are written
    out, bool [Q, S] for all samples, or [B, Q, S] where a part has a prefix. Causality stays beside a scope, because
    kernels skip what it hides."""
    (batch, _, queries, _), keys = q_BHQD.shape, k_BKSD.shape[2]
    seen = conditions(mask, batch)
    spans = None
    if seen.documents is not None:
        spans = Spans(*_span(seen.documents, seen.key_documents), *_span(seen.key_documents, seen.documents))
    if not mask.shift and (mask.scope is None or mask.window is not None):
        return Lowered(seen, spans, mask.causal)
    if mask.shift:
        seen = seen._replace(prefix=None, window=None)
    places = mask._replace(documents=None, key_documents=None)
    written = lower(places, queries, keys, q_BHQD.device)
    if written is None:
        return Lowered(seen, spans, False)
    allowed = written[:, 0].expand(batch, queries, keys).view(torch.uint8)
    seen = seen._replace(allowed=allowed, **dict(zip(_ALLOWED, allowed.stride(), strict=True)))
    return Lowered(seen, spans, mask.causal and not mask.shift)


def conditions(mask: Mask, batch: int) -> Seen:
    """What kernels check beside causality: documents, a prefix and a window."""
    theirs = mask.documents if mask.key_documents is None else mask.key_documents
    return Seen(
        counts=None,
        documents=of_samples(mask.documents, batch),
        key_documents=of_samples(theirs, batch),
        prefix=of_samples(mask.prefix if mask.causal else None, batch),
        window=mask.window,
        allowed=None, allowed_batch=0, allowed_query=0, allowed_key=0,
    )  # fmt: skip


_ALLOWED = "allowed_batch", "allowed_query", "allowed_key"


def _span(documents_BX: Tensor, others_BY: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the last place of a document's number among others; sizes depend on no number, so that nothing
    waits for the GPU."""
    ordered, places = torch.sort(others_BY, dim=1, stable=True)  # hence of a number the first comes first
    begin = torch.searchsorted(ordered, documents_BX)
    end = torch.searchsorted(ordered, documents_BX, right=True)
    some, most = end > begin, others_BY.shape[1] - 1
    first = torch.where(some, places.gather(1, begin.clamp(max=most)), others_BY.shape[1])
    last = torch.where(some, places.gather(1, (end - 1).clamp(min=0)), -1)
    return first.to(torch.int32), last.to(torch.int32)


def of_samples(x: Tensor | None, batch: int) -> Tensor | None:
    """Numbers of documents or places for every sample; 32 bits hold them, and take half of the registers."""
    return None if x is None else x.expand(batch, *x.shape[1:]).to(torch.int32).contiguous()


def dropped(dropout: WeightDropout | None) -> Dropped | None:
    """Dropout of weights, if any are dropped.

    Raises:
        KernelUnavailable: the first key here does not begin eight, for which one Philox call decides.
    """
    if dropout is None or not random.threshold(dropout.p):
        return None
    if dropout.first_key % 8:
        rule = f"its dropout takes a first key that is a multiple of 8, not {dropout.first_key}"
        raise KernelUnavailable("triton", rule, "blocks")
    least, factor = random.threshold(dropout.p), random.kept_scale(dropout.p)
    slots, positions = (x.to(torch.int64).contiguous() for x in (dropout.slots, dropout.positions))
    return Dropped(dropout.key, least, factor, slots, positions, dropout.first_head, dropout.first_key)


def padded(width: int) -> int:
    """The power of two, at least 16 as products of tiles demand, that holds a head dimension."""
    return max(16, triton.next_power_of_2(width))
