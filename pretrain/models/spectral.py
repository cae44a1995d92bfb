"""Linear layers whose largest singular value is a parameter of its own (sigmaReparam, Zhai et al. 2023).

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize


class SpectralLinear(nn.Linear):
    """x (gain W / sigma(W))^T + b, with sigma(W) = u^T W v the spectral norm (section 3.2; gain begins at 1).

    u is a buffer that `iterate` moves by a power iteration, once an optimizer step, so that all micro-batches of
    a step see the same weights. v follows from u. Both are constants of the gradient: d sigma / dW = u v^T.
    """

    direction: Tensor

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, bias)
        self.gain = nn.Parameter(torch.empty(1))
        self.register_buffer("direction", torch.empty(outputs))

    def reset_parameters(self) -> None: ...  # initial weights depend on canonical names

    def sigma(self) -> Tensor:
        """The estimate of the spectral norm, 0-dim, in the weights' dtype; from below."""
        u_O, weight_OI = self.direction, self.weight
        with torch.autocast(weight_OI.device.type, enabled=False):
            v_I = normalize(u_O @ weight_OI.detach(), dim=0)
            return torch.dot(u_O, weight_OI @ v_I)

    def matrix(self) -> Tensor:
        """gain W / sigma(W), [O, I]."""
        return self.weight * (self.gain / self.sigma())

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.matrix(), self.bias)

    @torch.no_grad()
    def iterate(self, weight_OI: Tensor | None = None, times: int = 1) -> None:
        """Power iterations: u = W W^T u, normalised.

        Args:
            weight_OI: the whole weight, where this module holds a part of it only.
            times: iterations; before the first step some more are wanted (torch's spectral_norm takes 15).
        """
        weight_OI = self.weight if weight_OI is None else weight_OI
        for _ in range(times):
            v_I = normalize(self.direction @ weight_OI, dim=0)
            self.direction.copy_(normalize(weight_OI @ v_I, dim=0))
