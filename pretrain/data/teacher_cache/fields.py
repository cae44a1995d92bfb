"""What a row of a cache holds, and its bits. Shapes: `n` samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Bits = NDArray[Any]
"""Elements as signed integers of their width: numpy has no bfloat16, and a NaN equals itself."""

CODES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
"""What a field may hold -> its code in safetensors. This is the order of arrays in a shard, as safetensors' own
writer has it: widest first, so that every array is aligned to its elements."""
NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in CODES}

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Field:
    """What a row holds under one name: a tensor of fixed dtype and shape.

    Attributes:
        dtype: bfloat16, float16, float32, float64, int32 or int64; what is given in another is converted when written.
        shape: of one sample, without the dim of samples.

    Raises:
        ValueError: another dtype, or a size below 1.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in CODES:
            raise ValueError(f"dtype of a field is one of {', '.join(NAMES)}, not {self.dtype}")
        if not all(type(size) is int and size > 0 for size in self.shape):
            raise ValueError(f"shape of a field is whole numbers above 0, not {self.shape}")

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"

    @property
    def nbytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def bits(self) -> np.dtype[Any]:
        """Numpy's dtype of the elements as integers, little endian as on disk."""
        return np.dtype(f"<i{self.dtype.itemsize}")


Fields = dict[str, Field]

KEY = "key"
KEY_FIELD = Field(torch.int64, ())


def to_bits(value: Tensor, field: Field, name: str) -> Bits:
    """The bits of a tensor [n, *shape], converted to the field's dtype.

    Raises:
        ValueError: the shape is another, or a number does not fit: a fraction into integers, an integer or a float
            beyond the range. Rounding to fewer digits is what a narrower field asks for.
    """
    if value.shape[1:] != field.shape:
        raise ValueError(f"{name}: rows of shape {list(value.shape[1:])}, its field has {list(field.shape)}")
    if value.is_floating_point() != field.dtype.is_floating_point:
        raise ValueError(
            f"{name}: {value.dtype} given, its field is {field.dtype}: convert it, if that is meant"
        )
    kept = value.detach().to(field.dtype)
    if value.is_floating_point():
        fits = torch.equal(kept.isinf(), value.isinf())
    else:
        fits = torch.equal(kept.to(torch.int64), value.to(torch.int64))
    if not fits:
        raise ValueError(f"{name}: numbers beyond the range of {field.dtype}; declare a wider field")
    return kept.cpu().contiguous().view(_BITS[field.dtype.itemsize]).numpy()


def from_bits(bits: Bits, field: Field) -> Tensor:
    """The tensor of these bits [n, ...]; shares their memory."""
    return torch.from_numpy(bits).view(field.dtype)


def key_array(keys: Tensor | Ints) -> Ints:
    """Keys as numpy's int64 [n]; raises ValueError if they are something else."""
    array = keys.detach().cpu().numpy() if isinstance(keys, Tensor) else np.asarray(keys)
    if array.dtype != np.int64 or array.ndim != 1:
        raise ValueError(f"keys are int64 [n], not {array.dtype} {list(array.shape)}")
    return array
