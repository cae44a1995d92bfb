"""Bytes of tensors that are alive: every storage is counted from the operator that makes it until it is freed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorBytes(TorchDispatchMode):
    """Counts what is made while it is active, and what it is given.

    What an operator uses inside, before it returns, is not seen. DTensors are seen as the local tensors they are.

    Attributes:
        alive: bytes now.
        peak: the most that were alive since `restart`.
        at_peak: the last operator's name then.
    """

    def __init__(self, elsewhere: Callable[[], int] = lambda: 0) -> None:
        """`elsewhere`: how many of the bytes are not to count: what was offloaded."""
        super().__init__()
        self.alive = self.peak = 0
        self.at_peak = ""
        self.elsewhere = elsewhere
        self._sizes: dict[int, int] = {}

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were made before."""
        for tensor in tensors:
            self._count(tensor)

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.alive - self.elsewhere()

    def __enter__(self) -> TensorBytes:
        self._resize = torch.UntypedStorage.resize_
        resize, tracker = self._resize, self

        def resized(
            storage: torch.UntypedStorage, size: int
        ) -> Any:  # FSDP frees gathered parameters this way
            result = resize(storage, size)
            tracker._resized(storage)
            return result

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        now = self.alive - self.elsewhere()
        if now > self.peak:
            self.peak, self.at_peak = now, str(func)
        return result

    def _count(self, tensor: Tensor) -> None:
        if hasattr(tensor, "to_local"):
            tensor = tensor.to_local()
        storage = tensor.untyped_storage()
        if storage.device.type == "meta":
            return
        key = id(storage)
        if key not in self._sizes:
            weakref.finalize(storage, self._freed, key).atexit = False
        self._resized(storage)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self.alive += size - self._sizes.get(key, 0)
        self._sizes[key] = size

    def _freed(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)
