"""What ranks of a pipeline tell each other outside torch's schedules: tensors, and short descriptions as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from headway.parallel.pipeline.stages import SideShape


@dataclass
class Shapes:
    """What goes into and out of a stage, but for the number of rows.

    Attributes:
        into: shape of a row, dtype and whether it takes a gradient, of each tensor.
        out: the same of what comes out; empty of the last stage.
        sides: what the uses of blocks before this stage give beside.
    """

    into: list[tuple[tuple[int, ...], str, bool]] = field(default_factory=list)
    out: list[tuple[tuple[int, ...], str, bool]] = field(default_factory=list)
    sides: list[SideShape] = field(default_factory=list)

    @classmethod
    def of(cls, told: dict[str, Any] | None) -> Shapes:
        """From what the stage before told; the first stage is told nothing."""
        if told is None:
            return cls()
        into = [(tuple(shape), dtype, bool(grad)) for shape, dtype, grad in told["tensors"]]
        return cls(into, [], [[(name, width) for name, width in side] for side in told["sides"]])

    def put_out(self, made: Sequence[Tensor]) -> None:
        """Note what a row became."""
        self.out = [(tuple(t.shape[1:]), str(t.dtype).removeprefix("torch."), t.requires_grad) for t in made]

    def text(self, own: list[SideShape]) -> dict[str, Any]:
        """What to tell the next stage."""
        return {"tensors": self.out, "sides": [*self.sides, *own]}

    def examples(self, which: str, rows: int) -> tuple[Tensor, ...]:
        """Tensors `into` or `out` of the stage on the meta device."""
        return tuple(
            torch.empty((rows, *shape), dtype=getattr(torch, dtype), device="meta", requires_grad=grad)
            for shape, dtype, grad in getattr(self, which)
        )

    def zeros(self, device: torch.device) -> list[Tensor]:
        """A row of zeros of everything that goes in."""
        return [
            torch.zeros_like(t, device=device).requires_grad_(t.requires_grad)
            for t in self.examples("into", 1)
        ]

    def __hash__(self) -> int:
        return hash((tuple(self.into), tuple(self.out)))


class Messages:
    """Messages along a pipeline.

    Args:
        group: its ranks. Ranks in the calls are global ones.
        device: of tensors.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self._pending: list[tuple[dist.Work | None, Tensor]] = []

    def send(self, tensors: Sequence[Tensor], rank: int) -> None:
        """Send without waiting; `wait` waits for all."""
        self._pending += [(dist.isend(t, rank, group=self.group), t) for t in tensors]

    def receive(self, like: Sequence[Tensor], rank: int) -> list[Tensor]:
        """What a rank sends, shaped like the examples."""
        received = [torch.empty_like(t, device=self.device, requires_grad=False) for t in like]
        for tensor in received:
            dist.recv(tensor, rank, group=self.group)
        return received

    def wait(self) -> None:
        for work, _ in self._pending:
            if work is not None:
                work.wait()
        self._pending.clear()

    def send_text(self, value: Any, rank: int) -> None:
        """Send a JSON value."""
        data = self._encode(value)
        dist.send(torch.tensor([len(data)], device=self.device), rank, group=self.group)
        dist.send(data, rank, group=self.group)

    def receive_text(self, rank: int) -> Any:
        """The JSON value that a rank sends."""
        length = torch.zeros(1, dtype=torch.int64, device=self.device)
        dist.recv(length, rank, group=self.group)
        data = torch.empty(int(length), dtype=torch.uint8, device=self.device)
        dist.recv(data, rank, group=self.group)
        return self._decode(data)

    def broadcast(self, value: Any, rank: int) -> Any:
        """The JSON value of one rank, on all."""
        data = self._encode(value)
        length = torch.tensor([len(data)], device=self.device)
        dist.broadcast(length, rank, group=self.group)
        if dist.get_rank() != rank:
            data = torch.empty(int(length), dtype=torch.uint8, device=self.device)
        dist.broadcast(data, rank, group=self.group)
        return self._decode(data)

    def _encode(self, value: Any) -> Tensor:
        return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=self.device)

    def _decode(self, data: Tensor) -> Any:
        return json.loads(bytes(data.tolist()))
