"""Initial weights as a function of (seed, canonical name, global coordinates).

Any rank fills any slice of a parameter, with the bits that slicing the whole would give.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headway.kernels import random
from headway.pretrain import config
from headway.pretrain.models.schemes import Fill, rule

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
    slice_of: Callable[[str, Any], Slice] | None = None,
) -> None:
    """Fill the parameters and persistent buffers of `module`, and the salts of what it drops at random.

    Args:
        module: a model or an objective whose tensors are materialised; its parameter names are taken as
            canonical.
        model: gives scheme, deviation and depth.
        seed: of the run.
        slice_of: (name, tensor) -> the part that is held here; the whole tensor if not given.
    """
    kept = module.state_dict().keys()
    buffers = ((name, buffer) for name, buffer in module.named_buffers() if name in kept)
    for name, tensor in (*module.named_parameters(), *buffers):
        part = slice_of(name, tensor) if slice_of else whole(tensor)
        fill(part, name, rule(name, part.shape, model), seed)
    for name, child in module.named_modules():
        salt = getattr(child, "salt", None)
        if isinstance(salt, Tensor):
            salt.fill_(random.key(0, "dropout", name))


def whole(tensor: Tensor) -> Slice:
    """All of a parameter or buffer."""
    return Slice(tensor, tuple(tensor.shape), (0,) * tensor.dim())


def fill(part: Slice, name: str, how: Fill, seed: int) -> None:
    """Fill `part.local` as `how` says, with numbers rounded from fp32, or fp64 for `orthogonal` and `unit`."""
    key = random.key(seed, "init", name)
    if how.kind == "constant":
        part.local.fill_(how.value)
    elif how.kind in _WHOLE:
        make = _WHOLE[how.kind]
        held = zip(part.offset, part.local.shape, strict=True)
        part.local.copy_(make(key, part.shape)[tuple(slice(o, o + n) for o, n in held)] * how.value)
    elif part.local.numel():
        _fill_rows(part, key, how)


_DRAW = {
    "normal": random.normal,
    "truncated": random.truncated_normal,
    "uniform": random.centred_uniform,
}


def _fill_rows(part: Slice, key: int, how: Fill) -> None:
    local, start = part.local, part.offset[-1]
    rows = _global_rows(part).flatten()
    table = local.view(-1, local.shape[-1])
    step = max(1, _ELEMENTS // local.shape[-1])
    for first in range(0, table.shape[0], step):
        numbers = _DRAW[how.kind](key, rows[first : first + step], start, start + local.shape[-1])
        table[first : first + step] = numbers * how.value


def _global_rows(part: Slice) -> Tensor:
    """Index, among the whole parameter's rows, of every row held here: leading dims count as in a matrix."""
    rows = torch.zeros((), dtype=torch.int64, device=part.local.device)
    for size, held, offset in zip(part.shape[:-1], part.local.shape[:-1], part.offset[:-1], strict=True):
        rows = rows.unsqueeze(-1) * size + torch.arange(offset, offset + held, device=part.local.device)
    return rows


def _normals(key: int, shape: tuple[int, ...]) -> Tensor:
    """The whole tensor's normal numbers, fp64, on the CPU: one place, so that factorisations agree."""
    numbers = torch.empty(shape, dtype=torch.float64)
    _fill_rows(whole(numbers), key, Fill("normal"))
    return numbers


def _orthogonal(key: int, shape: tuple[int, ...]) -> Tensor:
    """Uniformly distributed orthogonal matrices [..., outputs, inputs], fp64 (Mezzadri 2007: the signs of R's
    diagonal are moved into Q). Every rank factorises the whole: an orthogonal matrix has no independent parts."""
    normals = _normals(key, shape)
    wide = shape[-2] < shape[-1]
    q, r = torch.linalg.qr(normals.mT if wide else normals)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return q.mT if wide else q


def _unit(key: int, shape: tuple[int, ...]) -> Tensor:
    """A vector of norm 1, fp64."""
    normals = _normals(key, shape)
    return normals / normals.norm()


def _identity(key: int, shape: tuple[int, ...]) -> Tensor:
    """Identity matrices [..., N, N]."""
    return torch.eye(shape[-2], shape[-1]).expand(shape)


_WHOLE = {"orthogonal": _orthogonal, "unit": _unit, "identity": _identity}
"""Tensors that have no independent parts: every rank makes the whole."""
