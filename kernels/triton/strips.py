"""Sums over rows in a fixed order: rows are divided into strips, each has a sum of its own, and those are added."""

from __future__ import annotations

import triton

_PROGRAMS = 1024
_LEAST = 8


def strips(rows: int, width: int, columns: int) -> int:
    """How many strips, each of some rows, where a program has so many columns of one.

    As many programs as keep a large GPU busy, and the same on every GPU, so that sums are.
    """
    found: int = min(triton.cdiv(rows, _LEAST), _PROGRAMS // triton.cdiv(width, columns))
    return max(1, found)
