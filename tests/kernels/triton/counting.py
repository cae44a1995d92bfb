"""What a kernel reads, writes and multiplies, counted by the interpreter while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np


@dataclass
class Count:
    """Bytes asked of memory and given to it (of lanes whose mask is true), and FLOPs of products of tiles."""

    read: int = 0
    written: int = 0
    products: int = 0


@contextmanager
def counted() -> Iterator[Count]:
    """What is interpreted within it."""
    from triton.runtime.interpreter import InterpreterBuilder

    count = Count()

    def around(name: str, note: Any) -> Any:
        real = getattr(InterpreterBuilder, name)

        def call(self: Any, *given: Any, **named: Any) -> Any:
            note(*given)
            return real(self, *given, **named)

        return mock.patch.object(InterpreterBuilder, name, call)

    def load(pointers: Any, mask: Any, *_: Any) -> None:
        count.read += int(np.count_nonzero(mask.data)) * _bytes(pointers)

    def store(pointers: Any, value: Any, mask: Any, *_: Any) -> None:
        count.written += int(np.count_nonzero(mask.data)) * _bytes(pointers)

    def add(_: Any, pointers: Any, value: Any, mask: Any, *__: Any) -> None:
        load(pointers, mask)
        store(pointers, value, mask)

    def dot(a: Any, b: Any, d: Any, *_: Any) -> None:
        count.products += 2 * d.data.size * a.data.shape[-1]

    with ExitStack() as stack:
        for name, note in (
            ("create_masked_load", load),
            ("create_masked_store", store),
            ("create_atomic_rmw", add),
            ("create_dot", dot),
        ):
            stack.enter_context(around(name, note))
        yield count


def _bytes(pointers: Any) -> int:
    return int(pointers.get_element_ty().primitive_bitwidth) // 8
