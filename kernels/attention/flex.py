"""FlexAttention (Dong et al. 2024): masks, scopes, caps and slopes as code that PyTorch compiles into one kernel.

On GPUs: its backward does not exist on CPU.

Shapes: B batch, H query heads, K key/value heads, Q queries, S keys, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from headway.kernels.attention.masks import Mask
from headway.kernels.attention.scopes import Scope
from headway.kernels.attention.slopes import Slopes

VARIANTS = 64
"""Masks and scores for which one process may compile the kernel."""


def attention(
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    scale: float,
    slopes: Slopes | None = None,
    cap: float | None = None,
    sink_H: Tensor | None = None,
) -> Tensor:
    """Softmax attention, [B, H, Q, D] of v's width; see `compose.Form.reference`.

    Args:
        cap: bound of the scores, applied before slopes.
        sink_H: score of a key without a value.
    """
    from torch.nn.attention.flex_attention import AuxRequest

    compute = compiled() if q_BHQD.is_cuda else interpreted()
    with torch._dynamo.config.patch(recompile_limit=VARIANTS):
        found = compute(
            q_BHQD,
            k_BKSD,
            v_BKSD,
            score_mod=_score(slopes, cap),
            block_mask=_block_mask(mask, q_BHQD, k_BKSD),
            scale=scale,
            enable_gqa=q_BHQD.shape[1] != k_BKSD.shape[1],
            return_aux=None if sink_H is None else AuxRequest(lse=True),
        )
    if sink_H is None:
        return found
    out, lse_BHQ = found[0], found[1].lse
    kept = torch.sigmoid(lse_BHQ - sink_H.unsqueeze(-1).to(lse_BHQ.dtype))
    return (out * kept.unsqueeze(-1)).to(out.dtype)


@cache
def compiled() -> Callable[..., Any]:
    """The fused kernel, generated for what it is called with."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def interpreted() -> Callable[..., Any]:
    """The same by plain operations that hold [B, H, Q, S]: for tests of what is asked of the kernel."""
    from torch.nn.attention import flex_attention

    return flex_attention.flex_attention


def _score(slopes: Slopes | None, cap: float | None) -> Callable[..., Tensor] | None:
    """What becomes of a score."""
    if slopes is None and cap is None:
        return None

    def change(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if cap is not None:
            score = torch.tanh(score / cap) * cap
        if slopes is not None:
            score = score - slopes.slopes[h] * (slopes.keys[j] - slopes.queries[i]).abs()
        return score

    return change


def _block_mask(mask: Mask, q: Tensor, k: Tensor) -> Any:
    """The mask in blocks, so that those in which nothing is seen are not computed; None sees all."""
    assert mask.split is None
    assert mask.shift is None
    sizes = q.shape[2], k.shape[2]
    if mask.documents is None and mask.prefix is None:
        if not mask.causal and mask.scope is None:
            return None
        return _by_places(mask.causal, mask.scope, sizes, q.device)
    theirs = mask.documents if mask.key_documents is None else mask.key_documents
    near = None if mask.scope is None else mask.scope.test(sizes[1], mask.triangular, q.device)

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        ok = i >= j if mask.causal else i >= 0
        if mask.prefix is not None:
            ok = ok | (j < mask.prefix[b])
        if near is not None:
            ok = ok & near(i, j)
        if mask.documents is not None and theirs is not None:
            ok = ok & (mask.documents[b, i] == theirs[b, j])
        return ok

    return _blocks(seen, len(q), sizes, q.device)


@lru_cache(maxsize=64)
def _by_places(causal: bool, scope: Scope | None, sizes: tuple[int, int], device: torch.device) -> Any:
    """A mask of places alone is made once."""
    near = None if scope is None else scope.test(sizes[1], causal, device)

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        ok = i >= j if causal else i >= 0
        return ok if near is None else ok & near(i, j)

    return _blocks(seen, None, sizes, device)


def _blocks(
    seen: Callable[..., Tensor], rows: int | None, sizes: tuple[int, int], device: torch.device
) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    # Compiled, it holds no matrix of all pairs.
    return create_block_mask(seen, rows, None, *sizes, device=device, _compile=device.type == "cuda")
