"""Many tensors in one launch: their addresses as numbers in a table, and which program works on which block of which.

A kernel is given pointers one by one, and a model has hundreds of tensors. So pointers are read from memory: a row of
the table has the addresses of what belongs together (parameter, gradient, moments) and how many elements each of them
has. Tensors may have any size; a program has one block of one tensor, and only a tensor's last block is masked: a mask
of unknown length would cut all loads to single elements.

The addresses are sent anew each time, since gradients move; the blocks only where sizes have changed. A CUDA graph
would keep the addresses of its capture, hence none may be captured.

Shapes: T tensors, R lists (roles of a tensor), P programs, N elements of a block.
"""

# Triton gives the arguments of kernels their types; only constants are marked.
# mypy: allow-incomplete-defs

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from headway.kernels.triton.numbers import narrowed

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""Of tensors in tables, as Triton calls them."""
ALIGNED = 16
"""Bytes of the widest load: where every address is a multiple, loads are so wide."""


class Table(NamedTuple):
    """What programs look up.

    Attributes:
        rows: int64 [T, R + 2]: addresses, then how many elements, then the first of the tensor's blocks.
        blocks: int32 [P, 2]: a tensor, and which of its blocks.
        aligned: whether all addresses are multiples of ALIGNED.
    """

    rows: Tensor
    blocks: Tensor
    aligned: bool


def table_of(lists: Mapping[str, Sequence[Tensor]], block: int) -> Table:
    """The table of lists of tensors that belong together by place, on their device.

    Args:
        lists: by name, in the order of a row: contiguous tensors, of one dtype in each list, and of equal shapes and
            devices at each place.
        block: elements of a program, N.

    Raises:
        ValueError: a list or a tensor is not like that.
    """
    check(lists)
    first = next(iter(lists.values()))
    sizes = tuple(x.numel() for x in first)
    starts, blocks = _blocks(sizes, block, first[0].device)
    addresses = [[x.data_ptr() for x in tensors] for tensors in lists.values()]
    aligned = all(address % ALIGNED == 0 for row in addresses for address in row)
    rows = torch.tensor([*addresses, sizes, starts], dtype=torch.int64).T.contiguous()
    return Table(_sent(rows, first[0].device), blocks, aligned)


def check(lists: Mapping[str, Sequence[Tensor]]) -> None:
    """Raises ValueError where lists do not belong together, as `table_of` says."""
    (leading, first), *_ = lists.items()
    for name, tensors in lists.items():
        if len(tensors) != len(first):
            raise ValueError(
                f"{name}: {len(tensors)} tensors beside {len(first)} of {leading}; one for each of them"
            )
        for i, (x, like) in enumerate(zip(tensors, first, strict=True)):
            if x.shape != like.shape or x.device != first[0].device:
                rule = f"must be as {leading}[{i}], {tuple(like.shape)}, and on {first[0].device}"
                raise ValueError(f"{name}[{i}]: of shape {tuple(x.shape)} on {x.device}, {rule}")
            if x.dtype != tensors[0].dtype or x.dtype not in DTYPES:
                rule = f"a list has one dtype (here {tensors[0].dtype}), of {', '.join(map(str, DTYPES))}"
                raise ValueError(f"{name}[{i}]: {x.dtype}; {rule}")
            if not x.is_contiguous():
                raise ValueError(f"{name}[{i}]: strides {x.stride()}; it must be contiguous")


@lru_cache(maxsize=64)
def _blocks(sizes: tuple[int, ...], block: int, device: torch.device) -> tuple[list[int], Tensor]:
    counts_T = torch.tensor([-(-size // block) for size in sizes])
    starts_T = counts_T.cumsum(0) - counts_T
    tensor_P = torch.repeat_interleave(torch.arange(len(sizes)), counts_T)
    block_P = torch.arange(len(tensor_P)) - starts_T[tensor_P]
    return starts_T.tolist(), torch.stack([tensor_P, block_P], 1).int().to(device)


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """From pinned memory, so that the host goes on."""
    if device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def dtype_of(tensors: Sequence[Tensor]) -> Any:
    """Triton's dtype of a list."""
    return DTYPES[tensors[0].dtype]


def corrections(
    state_steps: Sequence[Tensor], beta1: float, beta2: float, params: Sequence[Tensor]
) -> Tensor:
    """What debiases the moments of T parameters: 1 - beta1^t and sqrt(1 - beta2^t), fp32 [T, 2] of fp64.

    Kernels do not compute this: fp32 knows beta2 = 0.999 to 3e-8, hence 1 - beta2 to 3e-5 of it.

    Raises:
        ValueError: there is not one number for each parameter.
    """
    if len(state_steps) != len(params) or any(step.numel() != 1 for step in state_steps):
        shapes = [tuple(step.shape) for step in state_steps]
        raise ValueError(f"state_steps: of shapes {shapes}; one number for each of {len(params)} params")
    steps_T = torch.stack([step.view(()) for step in state_steps]).double()
    pair = 1 - torch.pow(beta1, steps_T), (1 - torch.pow(beta2, steps_T)).sqrt()
    return torch.stack(pair, 1).float().to(params[0].device, non_blocking=True)


# -- in kernels ----------------------------------------------------------------------------------------------------


@triton.jit
def block_of(rows, blocks, ROLES: tl.constexpr, N: tl.constexpr):
    """This program's tensor, the first of the N elements that it has of it, and how many the tensor has."""
    tensor = tl.load(blocks + 2 * tl.program_id(0))
    first = tl.load(blocks + 2 * tl.program_id(0) + 1).to(tl.int64) * N
    return tensor, first, tl.load(rows + tensor * (ROLES + 2) + ROLES)


@triton.jit
def pointer(rows, tensor, ROLE: tl.constexpr, ROLES: tl.constexpr, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """To the first element of a tensor in the list of number ROLE out of ROLES."""
    found = tl.load(rows + tensor * (ROLES + 2) + ROLE).to(tl.pointer_type(DTYPE))
    if ALIGN:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def taken(x, place, size, FULL: tl.constexpr):
    """Elements in fp32; those beyond `size` are 0. FULL: there are none."""
    if FULL:
        return tl.load(x + place).to(tl.float32)
    return tl.load(x + place, mask=place < size, other=0.0).to(tl.float32)


@triton.jit
def put(x, place, size, value, FULL: tl.constexpr):
    """What `taken` read, rounded to the tensor's dtype; in fp32 what will be read again."""
    value = narrowed(value, x.dtype.element_ty)
    if FULL:
        tl.store(x + place, value)
    else:
        tl.store(x + place, value, mask=place < size)
    return value.to(tl.float32)
