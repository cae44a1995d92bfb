"""Softmax attention and attention with sparse weights by Triton's kernels, on GPUs: which of them is for what.

For what FlexAttention and PyTorch's own kernels lack: dropout of weights that is the same at any layout, biases that
learn, sparsemax and 1.5-entmax. See `kernels/triton/` for each, and docs/kernels.md for what they cost.

Shapes: B batch, H query heads, K key/value heads, Q queries, S keys, D head dimension.
"""

from __future__ import annotations

from torch import Tensor

from headway.kernels.attention.dense import WeightDropout
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.slopes import Bias
from headway.kernels.attention.weights import Entmax15, Sparsemax, Weighting

SPARSE = (Sparsemax, Entmax15)
"""Weightings whose zeros are exact."""
WIDEST = 256
"""Head dimension at most, of keys and of values: a row of a tile is held in registers."""


def attention(
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
    bias_HQK: Bias | None = None,
    *,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """Softmax attention, [B, H, Q, D] of v's width; see `compose.Form.reference`.

    A scope other than a window is gone through by the blocks that it leaves where nothing else is asked; beside a bias,
    a cap or sinks it is written out, bool [Q, S].
    """
    blocks = (
        mask.scope is not None and mask.window is None and _whole(mask) and q_BHQD.shape[2] == k_BKSD.shape[2]
    )
    if blocks and bias_HQK is None and softcap is None and sink is None and k_BKSD.shape == v_BKSD.shape:
        from headway.kernels.triton import block_sparse

        return block_sparse.attention(q_BHQD, k_BKSD, v_BKSD, mask, dropout, scale)
    from headway.kernels.triton import attention as fast

    operands = q_BHQD, k_BKSD, v_BKSD, mask, dropout, scale, bias_HQK
    return fast.attention(*operands, softcap=softcap, sink=sink)


def sparse(
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    weighting: Weighting,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention with weights of SPARSE, [B, H, Q, D]."""
    from headway.kernels.triton import sparse_weights

    return sparse_weights.attention(q_BHQD, k_BKSD, v_BKSD, mask, weighting, dropout, scale)


def _whole(mask: Mask) -> bool:
    return mask.prefix is None and mask.shift is None and mask.split is None and mask.key_documents is None
