"""Monarch matrices (Dao et al. 2022, definition 3.1; Fu et al. 2023, section 3) along the sequence: M = P L P R.

n = b^2 places are a square [b, b], read row by row. R mixes every row by a matrix of its own, P transposes the
square, L mixes the rows that were columns, and P transposes back: 2 n b products for n^2 of a dense matrix. Fourier's
matrix is one of them, up to P on its input. A row of n < b^2 places stands for one padded with zeros; what comes out
beyond it is not computed.

Shapes: B batch, H heads, D head dimension, S sequence, b block: left [H, b, b, b] and right [H, b, b, b] are b
matrices of outputs by inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(x_BSHD: Tensor, left_HBBB: Tensor, right_HBBB: Tensor) -> Tensor:
    """The specification, O(S^2): the matrix written out; returns [B, S, H, D]."""
    length = x_BSHD.shape[1]
    return torch.einsum("hst,bthd->bshd", matrix(left_HBBB, right_HBBB)[:, :length, :length], x_BSHD)


def matrix(left_HBBB: Tensor, right_HBBB: Tensor) -> Tensor:
    """M of every head, [H, b^2, b^2]: M[(s, q), (k, p)] = L[q, s, k] R[k, q, p]."""
    m_HBBBB = torch.einsum("hqsk,hkqp->hsqkp", left_HBBB, right_HBBB)
    return m_HBBBB.flatten(3).flatten(1, 2)


def blocks(x_BSHD: Tensor, left_HBBB: Tensor, right_HBBB: Tensor) -> Tensor:
    """As `reference`, in two batched products: O(S sqrt(S)) operations, O(S) memory.

    Args:
        x_BSHD: at most b^2 places.
        left_HBBB, right_HBBB: L and R; complex ones do too.
    """
    (batch, length, heads, dim), block = x_BSHD.shape, left_HBBB.shape[-1]
    assert length <= block**2, f"{length} places, and blocks of {block} hold {block**2}"
    rows = -(-length // block)  # rows of the square that hold anything; the others are zeros
    x = F.pad(x_BSHD, (0, 0, 0, 0, 0, rows * block - length))
    x_HKPN = x.view(batch, rows, block, heads, dim).permute(3, 1, 2, 0, 4).flatten(3)
    mixed_HKQN = right_HBBB[:, :rows] @ x_HKPN
    out_HQSN = left_HBBB[:, :, :rows, :rows] @ mixed_HKQN.transpose(1, 2)
    out = out_HQSN.unflatten(3, (batch, dim)).permute(3, 2, 1, 0, 4).reshape(batch, rows * block, heads, dim)
    return out[:, :length]


def flops(heads: int, dim: int, length: int, block: int) -> int:
    """Forward FLOPs of `blocks` on one row."""
    rows = -(-length // block)
    return 2 * heads * dim * rows * block * (block + rows)
