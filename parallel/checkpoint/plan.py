"""Who writes what: parts that several ranks hold are written by one of them, with even loads."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from headway.parallel.checkpoint.layout import Held
from headway.parallel.checkpoint.shards import key_of
from headway.parallel.checkpoint.team import Team, spread
from headway.pretrain.engine import State
from headway.pretrain.errors import CheckpointError
from headway.pretrain.tensor_files import Slot, arrange


@dataclass(frozen=True)
class Plan:
    """What this rank writes, as long as the layout stays.

    Attributes:
        layout: identity of every part that this rank holds; another layout wants another plan.
        chosen: which of these parts it writes, in the order of the file.
        slots: their places in the file.
        tensors: what its part file says of them: name -> shape, dtype, boxes.
    """

    layout: tuple[Any, ...]
    chosen: list[int]
    slots: list[Slot]
    tensors: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the shard file's data."""
        return self.slots[-1].stop if self.slots else 0

    def fits(self, have: list[Held]) -> bool:
        """The parts are still those that the plan was made for."""
        return self.layout == tuple(part.what for part in have)


def make_plan(state: State, have: list[Held], team: Team) -> Plan:
    """Agree on the writers; collective.

    Every rank says which parts it holds, 16 bytes for each and once for a layout (80 MB in all at 1,000 ranks
    and 5,000 tensors), so that it does not matter by which axis a value came to be on several ranks, nor
    whether the tensor knows.
    """
    names = [_identity(part) for part in have]
    said = team.gather_uneven([*names, *(part.nbytes for part in have)])
    holders: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    for rank, row in enumerate(said):
        for name, size in zip(row[: len(row) // 2], row[len(row) // 2 :], strict=True):
            holders.setdefault(name, []).append(rank)
            sizes[name] = size
    order = sorted(holders)
    owners = spread([holders[name] for name in order], [sizes[name] for name in order], team.world)
    mine = {name for name, owner in zip(order, owners, strict=True) if owner == team.rank}
    with team.together():
        return _plan(state, have, [index for index, name in enumerate(names) if name in mine])


def _plan(state: State, have: list[Held], chosen: list[int]) -> Plan:
    tensors: dict[str, Any] = {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."), "boxes": []}
        for name, tensor in state.tensors.items()
        if tensor.numel() == 0  # no part anywhere, but a tensor all the same
    }
    index_of: dict[str, int] = {}
    for index in chosen:
        part = have[index]
        key = key_of(part.name, part.box, part.shape)
        if index_of.setdefault(key, index) != index:
            raise CheckpointError(
                f"tensor {part.name}: its piece is called {key}, as is another tensor; rename one."
            )
        entry = tensors.setdefault(part.name, {"shape": part.shape, "dtype": part.dtype, "boxes": []})
        entry["boxes"].append((part.box.offset, part.box.shape))
    slots = arrange([(key, have[index].dtype, have[index].box.shape) for key, index in index_of.items()])
    layout = tuple(part.what for part in have)
    return Plan(layout, [index_of[slot.key] for slot in slots], slots, tensors)


def _identity(part: Held) -> int:
    """A number that is equal on two ranks if and only if they hold the same part."""
    digest = hashlib.blake2b(repr(part.what).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
