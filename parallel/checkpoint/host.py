"""The host copy of a shard: one buffer that is reused, laid out as the data of the file it becomes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from headway.pretrain.tensor_files import BLOCK


class HostBuffer:
    """Page-locked memory if anything comes from a GPU, plain memory else; grows, never shrinks."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        # Threads of our own: an OpenMP team spins for cores that other ranks of the machine are using.
        self._threads = min(4, torch.get_num_threads())
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="checkpoint-copy")

    def fill(self, views: Sequence[Tensor], starts: Sequence[int], nbytes: int) -> memoryview:
        """Copy tensors to `starts` (in bytes) in a buffer of `nbytes`; returns it when all are there.

        The memory is valid until the next call.
        """
        pinned = any(view.is_cuda for view in views)
        if self._bytes.numel() < nbytes or (pinned and not self._bytes.is_pinned()):
            self._bytes = torch.empty(0, dtype=torch.uint8)  # free the old one first
            self._bytes = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
        moves: list[tuple[int, int, int]] = []
        base = self._bytes.data_ptr()
        for view, start in zip(views, starts, strict=True):
            if view.device.type == "cpu" and view.is_contiguous():
                source, size = view.data_ptr(), view.nbytes
                moves += [
                    (base + start + at, source + at, min(BLOCK, size - at)) for at in range(0, size, BLOCK)
                ]
            else:
                place = self._bytes[start : start + view.nbytes].view(view.dtype).view(view.shape)
                place.copy_(view, non_blocking=view.is_cuda)
        if sum(size for _, _, size in moves) > BLOCK:
            list(self._pool.map(_move, (moves[lane :: self._threads] for lane in range(self._threads))))
        else:
            _move(moves)
        if pinned:
            torch.cuda.synchronize()
        return self._bytes.numpy().data[:nbytes]

    def close(self) -> None:
        """Give the memory and the threads back."""
        self._pool.shutdown()
        self._bytes = torch.empty(0, dtype=torch.uint8)


def _move(moves: list[tuple[int, int, int]]) -> None:
    for place, source, size in moves:
        ctypes.memmove(place, source, size)  # runs without the interpreter lock
