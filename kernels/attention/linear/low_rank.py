"""Linformer: softmax(Q (E K)^T / sqrt(D)) F V (Wang et al. 2020, equation 7).

Learned E and F shorten keys and values to `rank` rows; queries attend to those. Rows mix all places, so neither order
nor documents can be kept apart: bidirectional, one document a row, padding left out of the mixture.

Shapes: B batch, H query heads, K key/value heads, Q queries, S keys, T keys of the longest sequence, R rank, D head
dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.kernels.attention import blocks, dense
from headway.kernels.attention.dense import WeightDropout, per_query_head
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.registry import ALL, SPREAD, Kernel, Mechanism, Own, Shape


def reference(
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
    bias_HQK: Tensor | None = None,
    *,
    rank: int,
    project_keys: Tensor,
    project_values: Tensor,
) -> Tensor:
    """The specification of Linformer; returns [B, H, Q, D].

    Args:
        mask: bidirectional. Of its documents only padding (-1) counts: such keys and values are 0. Documents of
            queries change nothing.
        dropout: of the weights of a query on the rows of E K.
        scale: of the scores; 1 / sqrt(D) if None.
        rank: R.
        project_keys, project_values: E and F, [H, R, T]; a shorter sequence takes their first columns.

    `bias_HQK` must be None.
    """
    return _attend(
        dense.reference, q_BHQD, k_BKSD, v_BKSD, mask, dropout, scale, bias_HQK, project_keys, project_values
    )


def attention(
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
    bias_HQK: Tensor | None = None,
    *,
    rank: int,
    project_keys: Tensor,
    project_values: Tensor,
) -> Tensor:
    """As `reference`, O((Q + S) R D) in time and O((Q + S) D) in memory."""
    compute = dense.sdpa if dropout is None else blocks.attention
    return _attend(
        compute, q_BHQD, k_BKSD, v_BKSD, mask, dropout, scale, bias_HQK, project_keys, project_values
    )


def _attend(compute, q, k, v, mask, dropout, scale, bias, project_keys, project_values):
    assert bias is None
    assert not mask.causal
    assert mask.scope is None
    documents = mask.documents if mask.key_documents is None else mask.key_documents
    short = []
    for x, rows in ((k, project_keys), (v, project_values)):
        if documents is not None:
            x = torch.where(documents[:, None, :, None] >= 0, x, 0)
        short.append(rows[:, :, : x.shape[2]].to(x.dtype) @ per_query_head(x, q))
    return compute(q, *short, Mask(False), dropout, scale)


def _flops(shape: Shape) -> float:
    rank = shape.settings["rank"]
    return 4 * shape.heads * shape.dim * rank * (shape.queries + shape.keys)


def _bytes(shape: Shape, itemsize: int) -> float:
    """Queries and output, keys and values, E and F."""
    heads = shape.heads * shape.dim * shape.queries + shape.kv_heads * shape.dim * shape.keys
    return 2 * itemsize * (heads + shape.heads * shape.settings["rank"] * shape.keys)


def _projection(shape: Shape) -> tuple[int, int, int]:
    return shape.heads, shape.settings["rank"], shape.keys


ROWS: tuple[Mechanism, ...] = (
    Mechanism(
        name="linformer",
        kind="heads",
        formula="softmax(Q (E K)^T / sqrt(D)) F V",
        source="Wang et al. 2020, equation 7",
        settings={"rank": 256},
        # Variance 1 / rank, as theorem 2 draws them, at the default rank.
        own={name: Own(_projection, ("normal", 0.0625)) for name in ("project_keys", "project_values")},
        kernels={
            "reference": Kernel("reference", reference, dropout=True, bias=False, memory="S rank"),
            "projected": Kernel("projected", attention, dropout=True, bias=False, memory="S"),
        },
        flops=_flops,
        bytes=_bytes,
        state=lambda shape: 2 * shape.heads * shape.dim * shape.settings["rank"],
        order="n",
        supports=(ALL | SPREAD) - {"causal", "documents", "prefix", "bias", "scattered"},
    ),
)
