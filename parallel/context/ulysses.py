"""Ulysses attention (Jacobs et al. 2023): all-to-alls turn some columns of all heads into all columns of some heads,
where the kernels of one device do the rest, and turn the result back.

Shapes: B batch, H query heads, K key/value heads, D head dimension, S queries here, M keys here, T keys of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from headway.kernels.attention.dense import WeightDropout
from headway.kernels.attention.masks import Mask
from headway.parallel.context.exchange import Team

Kernel = Callable[[Tensor, Tensor, Tensor, Mask, WeightDropout | None, Tensor | None], Tensor]


def attention(
    q_BHSD: Tensor,
    k_BKMD: Tensor,
    v_BKMD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None,
    bias_HST: Tensor | None,
    team: Team,
    kernel: Kernel,
) -> Tensor:
    """Attention of this rank's queries to all ranks' keys, [B, H, S, D]; see `ring.attention`.

    Args:
        kernel: (q, k, v, mask, dropout, bias) of whole sequences -> output.
    """
    assert mask.split is not None
    asking, asked = mask.split
    k_BKMD, v_BKMD = (repeated(x, team.ranks) for x in (k_BKMD, v_BKMD))
    q = team.heads_for_columns(q_BHSD, asking)
    k, v = (team.heads_for_columns(x, asked) for x in (k_BKMD, v_BKMD))
    bias = None if bias_HST is None else team.heads_for_columns(bias_HST.unsqueeze(0), asking).squeeze(0)
    if dropout is not None:
        first, places = dropout.first_head + team.rank * q.shape[1], torch.arange(asking, device=q.device)
        dropout = dropout._replace(positions=places, first_head=first)
    return team.columns_for_heads(kernel(q, k, v, mask._replace(split=None), dropout, bias))


def repeated(kv_BKMD: Tensor, ranks: int) -> Tensor:
    """Key/value heads, each repeated as often as it takes that ranks share them evenly."""
    times = ranks // math.gcd(ranks, kv_BKMD.shape[1])
    return kv_BKMD if times == 1 else kv_BKMD.repeat_interleave(times, 1)
