"""The Hyena operator of order 2 (Poli et al. 2023, section 3), for causal models: q * (h conv (k * v) + skip (k * v)).

q, k and v are projections, each through a short causal filter of its own for every channel. The long filter h is not a
table: a small network with sine activations makes it from the place, and a decaying window, faster for some channels
than for others, holds it together (section 3.3). Its sizes are those of the authors' language models. A place is
measured against the length that the model is built for: another length is another filter.

A convolution runs over the whole row, so documents cannot be told apart; padding is set to zero before it can spread.

Shapes: B batch, S sequence, E hidden size, P features of a place, W width of the filter's network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.kernels.attention.choose import choose
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.mixers import convolution
from headway.kernels.attention.slopes import Bias
from headway.kernels.attention.words.mixers import FILTER_FEATURES
from headway.kernels.rotary import Rotation
from headway.pretrain import config
from headway.pretrain.models.cost import Cost, linear
from headway.pretrain.models.layers import Linear, Noise, build_linear, narrowed
from headway.pretrain.models.mixers.base import Mixer
from headway.pretrain.models.mixers.inner import real, refuse_qk_norm, without_padding
from headway.pretrain.models.seat import Seat

BANDS = FILTER_FEATURES // 2
"""Sines and cosines of a place, beside the place itself."""
FASTEST, SLOWEST, LEFT = 0.3, 1.5, 0.01
"""Shares of the row after which LEFT remains of a channel's filter."""


class Hyena(Mixer):
    """Gates and a convolution as long as the row."""

    def __init__(self, model: config.Model, seat: Seat, settings: Mapping[str, Any]) -> None:
        super().__init__(model, seat, settings)
        refuse_qk_norm(model, "hyena")
        e = model.hidden
        self.q, self.k, self.v, self.o = (build_linear(model, e, e) for _ in range(4))
        self.taps = nn.Parameter(torch.empty(3, e, settings["kernel_size"]))
        self.filter = Filter(e, settings["width"], seat.tokens)
        self.skip = nn.Parameter(torch.empty(e))
        self.convolve = choose("hyena", model.attention.kernel).compute

    def forward(
        self,
        x_BSE: Tensor,
        mask: Mask,
        turn: Rotation | None = None,
        noise: Noise | None = None,
        bias_HSM: Bias | None = None,
        memory_BME: Tensor | None = None,
        queries: int | None = None,
    ) -> tuple[Tensor, None]:
        """Returns [B, S, E] and None. Places after the first `queries` are not read: nothing before sees them."""
        x_BSE, real_BS = narrowed(x_BSE[:, :queries]), real(mask)
        projected = (without_padding(layer(x_BSE), real_BS) for layer in (self.q, self.k, self.v))
        taps = self.taps.to(x_BSE.dtype)
        q, k, v = (convolution.short(u, t) for u, t in zip(projected, taps, strict=True))
        u_BES = without_padding(k * v, real_BS).mT
        y_BES = self.convolve(u_BES, self.filter(x_BSE.shape[1]), self.skip)
        return self.o(q * y_BES.mT), None

    @staticmethod
    def parts(model: config.Model, seat: Seat, settings: Mapping[str, Any]) -> list[Cost]:
        e, n, width, gains = model.hidden, seat.tokens, settings["width"], int(model.spectral)
        shapes = ((FILTER_FEATURES, width), (width, width), (width, width))
        return [
            *[linear(e, e, model.bias, n, gains)] * 4,
            Cost(3 * e * settings["kernel_size"], 2 * 3 * e * settings["kernel_size"] * n),
            *(linear(i, o, True, n) for i, o in shapes),
            linear(width, e, False, n),
            Cost(width + e),  # frequencies of sines, skip
            Cost(flops=convolution.flops(e, n)),
        ]


class WideLinear(Linear):
    """A linear layer in the dtype of its input: sines of large angles want more digits than weights may have."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Filter(nn.Module):
    """h of a place: a network of sines (section 3.3) times an exponential window."""

    def __init__(self, hidden: int, width: int, tokens: int) -> None:
        """`tokens`: places that count as one."""
        super().__init__()
        self.tokens = max(tokens, 2)
        self.first = WideLinear(FILTER_FEATURES, width)
        self.second = WideLinear(width, width)
        self.third = WideLinear(width, width)
        self.last = WideLinear(width, hidden, bias=False)
        self.frequency = nn.Parameter(torch.empty(width))

    def forward(self, length: int) -> Tensor:
        """[E, S] in fp32, or wider as the parameters are: products of a row, however long the batch is."""
        weight = self.first.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        with torch.autocast(weight.device.type, enabled=False):
            share_S = torch.arange(length, device=weight.device, dtype=torch.float64) / (self.tokens - 1)
            x = self._features(share_S).to(wide)
            for layer in (self.first, self.second, self.third):
                x = torch.sin(self.frequency.to(wide) * layer(x))
            h_SE = self.last(x)
            return (h_SE * self._window(share_S, h_SE.shape[1]).to(wide)).mT

    def _features(self, share_S: Tensor) -> Tensor:
        """The place, and cosines and sines of up to BANDS - 1 turns a row: [S, P]."""
        turns = torch.linspace(1e-4, BANDS - 1, BANDS, dtype=torch.float64, device=share_S.device)
        angles = 2 * math.pi * (self.tokens - 1) / self.tokens * share_S[:, None] * turns
        return torch.cat((share_S[:, None], angles.cos(), -angles.sin()), -1)

    def _window(self, share_S: Tensor, channels: int) -> Tensor:
        """exp(-place x rate), rates evenly from slow to fast over the channels: [S, E]."""
        slow, fast = (-math.log(LEFT) / share for share in (SLOWEST, FASTEST))
        rates_E = torch.linspace(slow, fast, channels, dtype=torch.float64, device=share_S.device)
        return torch.exp(-share_S[:, None] * rates_E)
