"""Power iterations of reparametrised weights (`models.spectral`) that are cut over the tensor axis, as plain parts.

Shapes: O outputs, I inputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor

from headway.parallel.parts import Part
from headway.pretrain.models.spectral import SpectralLinear
from headway.pretrain.objectives import Objective


def iterate_parts(objective: Objective, parts: Mapping[str, Part], group: dist.ProcessGroup) -> None:
    """Let an objective's power iterations see whole weights, of which ranks of the tensor axis have parts.

    Args:
        parts: of every parameter, by name.
        group: of the tensor axis.
    """

    def iterate(times: int) -> None:
        for name, module in objective.named_modules():
            if isinstance(module, SpectralLinear):
                weight = module._parameters["weight"]
                assert weight is not None
                module.iterate(_joined(weight.detach(), parts[f"{name}.weight"], group), times)

    objective.iterate = iterate  # type: ignore[method-assign]


def _joined(weight_OI: Tensor, part: Part, group: dist.ProcessGroup) -> Tensor:
    """The whole matrix, put together from the parts of all ranks."""
    if part.shape == tuple(weight_OI.shape):
        return weight_OI
    whole_OI = weight_OI.new_zeros(part.shape)
    place = tuple(slice(o, o + n) for o, n in zip(part.offset, weight_OI.shape, strict=True))
    whole_OI[place] = weight_OI
    dist.all_reduce(whole_OI, group=group)
    return whole_OI
