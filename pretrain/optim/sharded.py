"""What optimizers need of tensors that are spread over ranks: their local part, and sums over all parts.

Whole tensors pass through unchanged, so the code that uses this reads as if there were one device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_spread(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether this is a DTensor; told by its mesh, since importing DTensor takes a single process 0.6 s."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The part that lives on this rank, sharing memory with the tensor."""
    return tensor.to_local() if is_spread(tensor) else tensor


@torch.no_grad()
def reduced(gradients: Iterable[Tensor]) -> list[Tensor]:
    """Gradients with all their pending sums carried out, so that their local parts are final.

    Costs one all-reduce for each distinct set of axes that sums are pending over, however many gradients there are.
    """
    given = list(gradients)
    pending = [_pending(gradient) for gradient in given]
    if not any(pending):
        return given
    sums = summed([local(gradient) for gradient in given], pending)
    triples = zip(given, sums, pending, strict=True)
    return [g if over is None else _with_sum(g, total) for g, total, over in triples]


def _pending(gradient: Tensor) -> Any:
    """Axes over which a gradient is still to be summed: a key for `summed`, or None."""
    if not is_spread(gradient):
        return None
    partial = tuple(p.is_partial() for p in gradient.placements)
    return (gradient.device_mesh, partial) if any(partial) else None


def _with_sum(gradient: Tensor, total: Tensor) -> Tensor:
    """A gradient whose local part is `total`, the sum that was pending."""
    from torch.distributed.tensor import DTensor, Replicate

    assert is_spread(gradient)
    placements = [Replicate() if p.is_partial() else p for p in gradient.placements]
    return DTensor.from_local(
        total,
        gradient.device_mesh,
        placements,
        run_check=False,
        shape=gradient.shape,
        stride=gradient.stride(),
    )


def whole(part: Tensor, like: Tensor) -> Tensor:
    """The full tensor of which `part` is this rank's share, spread as `like` is; gathers."""
    if not is_spread(like):
        return part
    from torch.distributed.tensor import DTensor

    spread = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return spread.full_tensor()


def share(full: Tensor, like: Tensor) -> Tensor:
    """This rank's share of a full tensor that every rank has, spread as `like` is; sends nothing."""
    if not is_spread(like):
        return full
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()] * like.device_mesh.ndim
    spread = DTensor.from_local(full, like.device_mesh, everywhere, run_check=False)
    return spread.redistribute(placements=like.placements).to_local()


def axes(like: Tensor, dim: int | None = None) -> Any:
    """Mesh axes over which a tensor (or just this dim of it, from 0) is cut: a key for `summed`.

    Returns: None if there is none, so that local sums are whole sums.
    """
    if not is_spread(like):
        return None
    if dim is None:
        cut = tuple(not p.is_replicate() for p in like.placements)
    else:  # Shard and FSDP2's _StridedShard have a dim, Replicate has none
        cut = tuple(getattr(p, "dim", None) == dim for p in like.placements)
    return (like.device_mesh, cut) if any(cut) else None


def summed(parts: Sequence[Tensor], over: Sequence[Any]) -> list[Tensor]:
    """Every part summed over its own mesh axes (see `axes`), equal on all ranks of these axes.

    Costs one all-reduce for each distinct set of axes, however many parts there are. Ranks pass parts of
    equal shapes in equal order.
    """
    done = list(parts)
    together: dict[Any, list[int]] = defaultdict(list)
    for i, key in enumerate(over):
        if key is not None:
            together[key, parts[i].dtype, parts[i].device].append(i)
    for (key, _, _), members in together.items():
        flat = _reduce(torch.cat([parts[i].reshape(-1) for i in members]), *key)
        pieces = flat.split([parts[i].numel() for i in members])
        for i, piece in zip(members, pieces, strict=True):
            done[i] = piece.reshape(parts[i].shape)
    return done


def _reduce(flat: Tensor, mesh: Any, cut: tuple[bool, ...]) -> Tensor:
    from torch.distributed.tensor import DTensor, Partial, Replicate

    # Along axes that are not summed, ranks may hold different numbers: nothing is sent along them.
    placements = [Partial() if c else Replicate() for c in cut]
    return DTensor.from_local(flat, mesh, placements, run_check=False).full_tensor()
