"""AdamW on the parts of tensors that live on this rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headway.pretrain.optim.sharded import is_spread, local


class AdamW(torch.optim.AdamW):
    """torch's AdamW (Loshchilov & Hutter 2019), which looks at every element alone.

    So what is spread is updated where it lives: torch would take DTensors too, but works out for each of them, at the
    cost of milliseconds a step, that nothing has to be sent.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        """Fill torch's lists of parameters, gradients and moments with local parts; state stays as it is spread."""
        has_complex: bool = super()._init_group(group, *lists)
        parameters, gradients, *moments = lists
        for i, (p, gradient) in enumerate(zip(parameters, gradients, strict=True)):
            if is_spread(p) and is_spread(gradient) and gradient.placements != p.placements:
                gradients[i] = gradient.redistribute(p.device_mesh, p.placements)
        for tensors in (parameters, gradients, *moments):
            tensors[:] = map(local, tensors)
        return has_complex
