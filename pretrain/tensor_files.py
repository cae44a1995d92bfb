"""Files of tensors: the safetensors format, written by hand from pieces of memory and hashed on the way.

A file is eight bytes (length of the header, little endian), a JSON header, and the raw tensors. Writing it
here rather than through `safetensors.torch.save_file` needs no second copy of the tensors, saves a second pass over
the bytes for the digest, and gives an fsync; the bytes are the same (tests compare them), and reading goes through
`safe_open`.
Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    "uint64": ("U64", 8),
    "int64": ("I64", 8),
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "uint32": ("U32", 4),
    "int32": ("I32", 4),
    "bfloat16": ("BF16", 2),
    "float16": ("F16", 2),
    "uint16": ("U16", 2),
    "int16": ("I16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}
"""torch's name of a dtype -> (its code in safetensors, bytes of an element), widest first: a file's order."""

_ORDER = {dtype: place for place, dtype in enumerate(DTYPES)}

BLOCK = 8 << 20
"""Bytes written, hashed or read at once: small beside any shard, large beside the cost of a call."""


@dataclass(frozen=True)
class Slot:
    """A piece's place in a shard file: its key there, dtype, shape, and where its bytes start and end."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def arrange(pieces: list[tuple[str, str, tuple[int, ...]]]) -> list[Slot]:
    """Places for pieces (key, dtype, shape): by dtype, widest first, then by key, without gaps.

    This is the order of safetensors' own writer; it keeps every piece aligned to its element size.
    """
    slots: list[Slot] = []
    at = 0
    for key, dtype, shape in sorted(pieces, key=lambda p: (_ORDER[p[1]], p[0])):
        stop = at + math.prod(shape) * DTYPES[dtype][1]
        slots.append(Slot(key, dtype, shape, at, stop))
        at = stop
    return slots


def header(slots: list[Slot], metadata: Mapping[str, str] | None = None) -> bytes:
    """Head of a shard file: length and JSON, padded with blanks so that the data starts at 8 n."""
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    table |= {
        s.key: {"dtype": DTYPES[s.dtype][0], "shape": list(s.shape), "data_offsets": [s.start, s.stop]}
        for s in slots
    }
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as a file holds them; its own memory where it is contiguous and on the host."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_shard(path: Path, head: bytes, data: Iterable[memoryview]) -> tuple[int, str]:
    """Write, hash and fsync a file; returns its bytes and its sha256. Raises OSError.

    Args:
        data: of the slots, in their order.
    """
    digest, size = hashlib.sha256(), 0
    with open(path, "xb", buffering=0) as file:
        for piece in chain((memoryview(head),), data):
            for at in range(0, len(piece), BLOCK):
                block = piece[at : at + BLOCK]
                digest.update(block)
                while block:  # a raw write may take less than it was given
                    block = block[file.write(block) :]
            size += len(piece)
        os.fsync(file.fileno())
    return size, digest.hexdigest()
