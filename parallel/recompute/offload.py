"""What the backward of blocks needs, kept in host memory (Rajbhandari et al. 2021, ZeRO-Infinity; Wang et al. 2018).

A block's saved tensors leave for the host as its forward makes them, and come back while the block after it is in its
backward: two blocks are on the device at a time. Whole storages travel, each once, so that strides and aliases are
those that were saved, and so are the bits of the gradients. Parameters stay, and what blocks share.

On CUDA copies go through pinned memory on a stream of their own; on CPU they are plain copies, for tests.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from headway.parallel.recompute.policies import Around, Forward
from headway.pretrain.optim.sharded import is_spread, local

SMALL = 4096
"""Bytes below which a tensor stays: the transfer would cost more than it frees."""


class Host:
    """The host's memory of one model's activations.

    Attributes:
        bytes: that it holds now.
        moved: that it was sent in all.
    """

    def __init__(self, device: torch.device) -> None:
        self.bytes = self.moved = 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.last: weakref.ref[Bag] | None = None

    def on_stream(self) -> Any:
        """The stream of copies, after all that the device has been told so far."""
        from contextlib import nullcontext

        if self.stream is None:
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        return torch.cuda.stream(self.stream)


class Away:
    """A storage that is on the host, and, from when it is fetched, on the device again."""

    def __init__(self, flat: Tensor, host: Host) -> None:
        self.host, self.device = host, flat.device
        self.back: Tensor | None = None
        self.event: Any = None
        with host.on_stream():
            self.copy = torch.empty_like(flat, device="cpu", pin_memory=host.stream is not None)
            self.copy.copy_(flat, non_blocking=True)
        if host.stream is not None:
            flat.record_stream(host.stream)
        host.bytes += flat.nbytes
        host.moved += flat.nbytes
        weakref.finalize(self, _leave, host, flat.nbytes).atexit = False

    def fetch(self) -> None:
        """Begin to bring it back."""
        if self.back is None:
            with self.host.on_stream():
                back = torch.empty_like(self.copy, device=self.device, pin_memory=False)
                self.back = back.copy_(self.copy, non_blocking=True)
                if self.host.stream is not None:
                    self.event = self.host.stream.record_event()

    def here(self) -> Tensor:
        """The storage on the device, flat."""
        self.fetch()
        assert self.back is not None
        if self.event is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(self.event)
            self.back.record_stream(current)
        return self.back


def _leave(host: Host, size: int) -> None:
    host.bytes -= size


class Bag:
    """What one use of a block has sent away, and what the block before it has."""

    def __init__(self, host: Host) -> None:
        self.host, self.before, self.opened = host, host.last, False
        self.known: dict[int, tuple[StorageWeakRef, weakref.ref[Away]]] = {}
        host.last = weakref.ref(self)

    def send(self, tensor: Tensor) -> Away:
        """The storage of a tensor, sent once."""
        storage = tensor.untyped_storage()
        known = self.known.get(storage._cdata)
        away = known[1]() if known else None
        if away is None:
            flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage)
            away = Away(flat, self.host)
            # The weak reference keeps the address from being given to another storage.
            self.known[storage._cdata] = StorageWeakRef(storage), weakref.ref(away)
        return away

    def open(self) -> None:
        """The block's backward begins: what the block before it needs is fetched meanwhile."""
        if not self.opened:
            self.opened = True
            before = self.before() if self.before else None
            for _, reference in before.known.values() if before else ():
                if (away := reference()) is not None:
                    away.fetch()


class Saved:
    """A tensor that autograd has saved: a view of a storage that is away."""

    def __init__(self, tensor: Tensor, bag: Bag) -> None:
        part = local(tensor)
        self.bag, self.away, self.dtype = bag, bag.send(part), part.dtype
        self.view = part.shape, part.stride(), part.storage_offset()
        self.like = (
            (tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride())
            if is_spread(tensor)
            else None
        )

    def here(self) -> Tensor:
        """The tensor, as it was saved."""
        self.bag.open()
        part = self.away.here().view(self.dtype).as_strided(*self.view)
        if self.like is None:
            return part
        from torch.distributed.tensor import DTensor

        mesh, placements, shape, stride = self.like
        return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)


class Offloaded(Around):
    """A block's forward whose saved tensors go to the host."""

    def __init__(self, block: nn.Module, host: Host) -> None:
        super().__init__(block.forward)
        self.block, self.host = weakref.ref(block), host

    def __call__(self, x: Tensor, context: Any) -> Any:
        block = self.block()
        assert block is not None
        shared = [leaf for leaf in tree_leaves(context) if isinstance(leaf, Tensor)]
        stay = {local(t).untyped_storage()._cdata for t in (*block.parameters(), *shared)}
        bag = Bag(self.host)

        def pack(tensor: Tensor) -> Tensor | Saved:
            storage = local(tensor).untyped_storage()
            if storage._cdata in stay or storage.nbytes() < SMALL or tensor.device.type == "meta":
                return tensor
            return Saved(tensor, bag)

        with saved_tensors_hooks(pack, lambda packed: packed.here() if isinstance(packed, Saved) else packed):
            return self.forward(x, context)


def offload(block: nn.Module, host: Host) -> None:
    """Let a block's saved tensors go to the host."""
    block.forward = Offloaded(block, host)


__all__ = ["Forward", "Host", "Offloaded", "offload"]
