"""Initial weights as a function of (seed, canonical name, global coordinates).

Any rank fills any slice of a parameter, with the bits that slicing the whole would give.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from headway.kernels import random
from headway.pretrain import config
from headway.pretrain.models.layers import Dropout

_ELEMENTS = 1 << 16  # filled at once: temporaries of this size stay in a CPU's cache


class Slice(NamedTuple):
    """A part of a parameter.

    Attributes:
        local: the tensor to fill.
        shape: shape of the whole parameter.
        offset: where `local` begins in it, one number a dim.
    """

    local: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]


@torch.no_grad()
def initialise(
    module: nn.Module,
    model: config.Model,
    seed: int,
    slice_of: Callable[[str, nn.Parameter], Slice] | None = None,
) -> None:
    """Fill the parameters of `module`, and the salts of its dropout.

    Args:
        module: a model or an objective whose tensors are materialised; its parameter names are taken as
            canonical.
        model: gives the standard deviation.
        seed: of the run.
        slice_of: (name, parameter) -> the part that is held here; the whole parameter if not given.
    """
    for name, parameter in module.named_parameters():
        part = slice_of(name, parameter) if slice_of else whole(parameter)
        fill(part, name, scale(name, model), seed)
    for name, child in module.named_modules():
        if isinstance(child, Dropout):
            child.salt.fill_(random.key(0, "dropout", name))


def whole(parameter: Tensor) -> Slice:
    """All of a parameter."""
    return Slice(parameter, tuple(parameter.shape), (0,) * parameter.dim())


def scale(name: str, model: config.Model) -> float | str:
    """Standard deviation of a parameter's initial weights, or "zeros" or "ones".

    Projections into the residual stream, of which there are two a block, get std / sqrt(2 layers), so that the
    stream's variance does not grow with depth (GPT-2, section 2.3).
    """
    owner, _, kind = name.rpartition(".")
    if kind == "bias":
        return "zeros"
    if owner.endswith("norm"):
        return "ones"
    if owner.endswith(("attention.o", "mlp.down")):
        return model.init.std / math.sqrt(2 * model.layers)
    return model.init.std


def fill(part: Slice, name: str, std: float | str, seed: int) -> None:
    """Fill `part.local` with "zeros", "ones" or normal numbers of deviation `std`, rounded from fp32."""
    local = part.local
    if std == "zeros" or std == "ones":
        local.fill_(float(std == "ones"))
        return
    assert isinstance(std, float)
    key = random.key(seed, "init", name)
    rows = _global_rows(part).flatten()
    start = part.offset[-1]
    table = local.view(-1, local.shape[-1])
    step = max(1, _ELEMENTS // max(1, local.shape[-1]))
    for first in range(0, table.shape[0], step):
        chosen = rows[first : first + step]
        table[first : first + step] = random.normal(key, chosen, start, start + local.shape[-1]) * std


def _global_rows(part: Slice) -> Tensor:
    """Index, among the whole parameter's rows, of every row held here: leading dims count as in a matrix."""
    rows = torch.zeros((), dtype=torch.int64, device=part.local.device)
    for size, held, offset in zip(part.shape[:-1], part.local.shape[:-1], part.offset[:-1], strict=True):
        rows = rows.unsqueeze(-1) * size + torch.arange(offset, offset + held, device=part.local.device)
    return rows
