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
from headway.kernels.attention.draw import Draw
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.scores import Extras
from headway.kernels.attention.slopes import Bias, Slopes
from headway.parallel.context.exchange import Team

Kernel = Callable[[Tensor, Tensor, Tensor, Mask, WeightDropout | None, Bias | None, Extras], Tensor]

Local = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The kernel with all but queries, keys and values filled in."""
Trade = Callable[[Tensor, Tensor, Tensor, tuple[int, int], Team, Local], Tensor]


def attention(
    q_BHSD: Tensor,
    k_BKMD: Tensor,
    v_BKMD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None,
    bias_HST: Bias | None,
    own: Extras,
    team: Team,
    kernel: Kernel,
    trade: Trade | None = None,
) -> Tensor:
    """Attention of this rank's queries to all ranks' keys, [B, H, S, D]; see `ring.attention`.

    Args:
        own: the mechanism's parameters [H, ...] and gates [B, H, S, ...], by name.
        kernel: (q, k, v, mask, dropout, bias, own) of whole sequences -> output.
        trade: how heads are exchanged for columns and back; `traded` if not given.
    """
    assert mask.split is not None
    asking, _ = mask.split
    k_BKMD, v_BKMD = (repeated(x, team.ranks) for x in (k_BKMD, v_BKMD))
    heads = q_BHSD.shape[1] // team.ranks
    bias = _bias(bias_HST, asking, heads, team)
    if dropout is not None:
        first, places = dropout.first_head + team.rank * heads, torch.arange(asking, device=q_BHSD.device)
        dropout = dropout._replace(positions=places, first_head=first)
    mine = {name: _mine(x, asking, team, heads) for name, x in own.items()}

    def local(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernel(q, k, v, mask._replace(split=None), dropout, bias, mine)

    return (trade or traded)(q_BHSD, k_BKMD, v_BKMD, mask.split, team, local)


def traded(
    q_BHSD: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, totals: tuple[int, int], team: Team, kernel: Local
) -> Tensor:
    """A kernel's output [B, H, S, D] for this rank's columns, from all columns of a share of the heads.

    Args:
        totals: queries and keys of the whole.
    """
    asking, asked = totals
    q = team.heads_for_columns(q_BHSD, asking)
    k, v = (team.heads_for_columns(x, asked) for x in (k_BKMD, v_BKMD))
    return team.columns_for_heads(kernel(q, k, v))


def _bias(bias_HST: Bias | None, total: int, heads: int, team: Team) -> Bias | None:
    """Of all queries and a rank's heads."""
    if isinstance(bias_HST, Slopes):  # of a sequence to itself: the keys are all of it
        return bias_HST._replace(queries=bias_HST.keys).of_heads(team.rank * heads, heads)
    return None if bias_HST is None else team.heads_for_columns(bias_HST.unsqueeze(0), total).squeeze(0)


def _mine(x: Tensor | Draw, total: int, team: Team, heads: int) -> Tensor | Draw:
    """A rank's heads of a parameter [H, ...], of a gate [B, H, S, ...] of all columns, or of what is drawn."""
    if isinstance(x, Draw):
        places = None if x.positions is None else torch.arange(total, device=x.positions.device)
        return x._replace(positions=places, first_head=x.first_head + team.rank * heads)
    if x.dim() == 4 and x.shape[2] != total:
        return team.heads_for_columns(x, total)
    share = x.shape[0] // team.ranks
    return x[team.rank * share : (team.rank + 1) * share]


def repeated(kv_BKMD: Tensor, ranks: int) -> Tensor:
    """Key/value heads, each repeated as often as it takes that ranks share them evenly."""
    times = ranks // math.gcd(ranks, kv_BKMD.shape[1])
    return kv_BKMD if times == 1 else kv_BKMD.repeat_interleave(times, 1)
