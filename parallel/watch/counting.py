"""Bytes that collectives move, counted while they are made, by axis of the mesh and kind.

    with Traffic(world) as traffic:
        engine.train_step(batch, step)
    traffic.moves                    # [Moved("shard", "all_gather", 137088), ...]

Every collective passes PyTorch's dispatcher, those that DDP's reducer makes in the backward too; this mode looks at
them on the way. It looks at every other operator as well, which costs some microseconds each: meant for a step now
and then, not for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headway.parallel.mesh import World
from headway.parallel.planner.traffic import Moved, sent
from headway.parallel.watch.ranks import varying

KINDS = {
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "allgather": "all_gather",
    "_allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "all_to_all": "all_to_all",
    "broadcast": "broadcast",
    "send": "send",
    "recv": "receive",
}
"""How an operator's name begins -> kind."""
INPUTS = ("input_tensor", "input_tensors", "input", "inputs", "tensors")
OUTPUTS = ("output_tensor", "output_tensors", "output_lists", "outputs", "out")
"""Arguments that hold the payload; if there is no output among the arguments, it is what is returned."""
SILENT = ("wait_tensor", "_wrap_tensor", "barrier", "monitored_barrier")
"""How operators begin that move nothing."""


class Traffic(TorchDispatchMode):
    """Counts within a `with` block, on this rank.

    Attributes:
        moves: what was moved, a line for each collective.
        ranks: size of the groups along each axis that was met.

    Raises (from the operator that is counted):
        NotImplementedError: a collective of a kind that is not known here.
    """

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.moves: list[Moved] = []
        self.ranks: dict[str, int] = {}

    def sent(self) -> dict[str, float]:
        """Axis -> bytes that left this rank, if collectives are as good as rings."""
        total: dict[str, float] = {}
        for axis, kind, size in self.moves:
            total[axis] = total.get(axis, 0) + sent(kind, size, self.ranks[axis])
        return total

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            self._count(func, [*args, *(kwargs or {}).values()], result)
        return result

    def _count(self, func: Any, args: list[Any], result: Any) -> None:
        name = func.overloadpacket.__name__
        if name.startswith(SILENT):
            return
        kind = next((kind for prefix, kind in KINDS.items() if name.startswith(prefix)), None)
        if kind is None:
            raise NotImplementedError(f"a collective {name} was made, whose bytes are not counted here")
        named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
        places = OUTPUTS if kind == "all_gather" else INPUTS
        payload = next((named[place] for place in places if place in named), result)
        ranks = dist.get_process_group_ranks(_group(named))
        axis = "+".join(varying(self.world.layout, ranks)) or "none"
        self.ranks[axis] = len(ranks)
        self.moves.append(Moved(axis, kind, _bytes(payload)))


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tensors) if isinstance(t, Tensor))


def _group(named: dict[str, Any]) -> dist.ProcessGroup:
    """The process group among an operator's arguments."""
    if "process_group" in named:
        return dist.ProcessGroup.unbox(named["process_group"])
    group = named["group_name"]
    return _resolve_process_group(group) if isinstance(group, str) else group  # type: ignore[arg-type]
