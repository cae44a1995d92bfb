"""What optimizers need to know of tensors that are spread over ranks: their local part, and that they are.

Whole tensors pass through unchanged, so the code that uses this reads as if there were one device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_spread(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether this is a DTensor; told by its mesh, since importing DTensor takes a single process 0.6 s."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The part that lives on this rank, sharing memory with the tensor."""
    return tensor.to_local() if is_spread(tensor) else tensor


def reduced(gradient: Tensor) -> Tensor:
    """The gradient with all its pending sums carried out, so that its local part is final."""
    if not is_spread(gradient) or not any(p.is_partial() for p in gradient.placements):
        return gradient
    from torch.distributed.tensor import Replicate

    return gradient.redistribute(
        placements=[Replicate() if p.is_partial() else p for p in gradient.placements]
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
