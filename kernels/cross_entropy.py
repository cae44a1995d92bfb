"""Head and cross-entropy in one, in chunks of rows: the full logits [N, V] never exist.

Gradients are computed in the forward, while a chunk's logits are at hand (Liger Kernel, Hsu et al. 2024), so the
head's product is done once; the backward only scales them. Loss and softmax are fp32 (fp64 for fp64) also where
the products are bf16.

Shapes: N rows (tokens), E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headway.kernels.precision import product_dtype

IGNORE = -100
"""Label of a row that is not scored."""

RowLoss = Callable[[Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]


def linear_cross_entropy(
    hidden_NE: Tensor,
    weight_VE: Tensor,
    labels_N: Tensor,
    z_loss: float = 0.0,
    chunk: int | None = None,
    compute: RowLoss | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of hidden @ weight^T, summed over rows whose label is not IGNORE.

    Args:
        hidden_NE: rows; products are in autocast's dtype where it is on, else in the rows' dtype.
        weight_VE: the head's weight.
        labels_N: int64.
        z_loss: weight of the squared log-partition (Chowdhery et al. 2022, section 5).
        chunk: at most so many rows of logits exist at once; see `chunk_rows`.
        compute: `row_loss` or a compiled form of it.

    Returns:
        The sum of cross-entropy in nats plus z_loss x squared log-partition, and that second part alone,
        weighted and without gradient. Both 0-dim, fp32 or fp64.
    """
    gradients = torch.is_grad_enabled() and (hidden_NE.requires_grad or weight_VE.requires_grad)
    return _LinearCrossEntropy.apply(
        hidden_NE, weight_VE, labels_N, z_loss, chunk, compute or row_loss, gradients
    )


def chunk_rows(vocab: int, itemsize: int, device: str) -> int:
    """Rows whose logits take 32 MiB on CPU, where more would leave the caches, and 256 MiB elsewhere."""
    budget = 2**25 if device == "cpu" else 2**28
    return max(128, budget // (vocab * itemsize) // 64 * 64)


def row_loss(logits_NV: Tensor, labels_N: Tensor, z_loss: float, gradients: bool) -> tuple[Tensor, Tensor]:
    """Sums of cross-entropy and of weighted squared log-partition.

    With `gradients`, the gradient of their sum by the logits takes the logits' place in memory. Written to be fused
    by the compiler, and with few passes over memory where it is not compiled.
    """
    wide = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    valid = (labels_N != IGNORE).unsqueeze(1)
    target = torch.where(valid, labels_N.unsqueeze(1), 0)
    log_p = torch.log_softmax(wide, 1)
    picked = log_p.gather(1, target)
    lse = wide.gather(1, target) - picked
    nll = -torch.where(valid, picked, 0).sum()
    z = torch.where(valid, lse.square(), 0).sum() * z_loss
    if gradients:
        slope = torch.where(valid, 1 + 2 * z_loss * lse, 0)
        gradient = log_p.exp_().mul_(slope)
        if torch.compiler.is_compiling():  # a scatter would end the fusion
            column = torch.arange(wide.shape[1], device=wide.device)
            gradient = gradient - ((column == target) & valid).to(wide.dtype)
        else:
            gradient.scatter_add_(1, target, -valid.to(wide.dtype))
        logits_NV.copy_(gradient)
    return nll, z


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, z_loss, chunk, compute, gradients):
        narrow = product_dtype(hidden)
        x, w = hidden.to(narrow), weight.to(narrow)
        with torch.autocast(x.device.type, enabled=False):
            total, z, d_hidden, d_weight = _over_chunks(x, w, labels, z_loss, chunk, compute, gradients)
        if gradients:
            ctx.save_for_backward(d_hidden, d_weight)
            ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(z)
        return total, z

    @staticmethod
    def backward(ctx, d_total, _):
        d_hidden, d_weight = ctx.saved_tensors
        for_hidden, for_weight = ctx.dtypes
        return (d_hidden * d_total).to(for_hidden), (d_weight * d_total).to(for_weight), *[None] * 5


def _over_chunks(x, w, labels, z_loss, chunk, compute, gradients):
    """Loss, its z part, and the gradients of hidden states and weight (None without `gradients`).

    Buffers serve all chunks: memory that is fresh for every chunk would cost as many page faults as there are logits.
    """
    count, device = x.shape[0], x.device
    wide = torch.promote_types(x.dtype, torch.float32)
    chunk = chunk or chunk_rows(w.shape[0], w.element_size(), device.type)
    rows = -(-count // max(1, -(-count // chunk)))  # chunks of one size, as far as rows divide
    total, z_total = (torch.zeros((), dtype=wide, device=device) for _ in range(2))
    logits = x.new_empty(rows, w.shape[0])
    d_hidden = torch.empty_like(x) if gradients else None
    d_weight = torch.zeros_like(w, dtype=wide) if gradients else None
    product = torch.empty_like(w) if gradients and x.dtype != wide else None
    for start in range(0, count, rows):
        part = x[start : start + rows]
        slope = logits[: part.shape[0]]
        torch.mm(part, w.T, out=slope)
        nll, z = compute(slope, labels[start : start + rows], z_loss, gradients)
        total, z_total = total + nll + z, z_total + z
        if d_hidden is None or d_weight is None:
            continue
        torch.mm(slope, w, out=d_hidden[start : start + rows])
        if product is None:
            d_weight.addmm_(slope.T, part)
        else:  # a narrow sum over chunks would lose bits
            d_weight += torch.mm(slope.T, part, out=product)
    return total, z_total, d_hidden, d_weight
