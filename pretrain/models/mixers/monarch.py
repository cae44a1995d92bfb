"""Mixing by Monarch matrices: y = q * M (k * v) along the sequence, for models that look both ways.

Monarch Mixer (Fu et al. 2023, section 3) in the place of attention, with its gates, and with M = P L P R learned
directly (Dao et al. 2022), one for every head, where Monarch Mixer's own models take Fourier's matrices and learn a
filter between them. Blocks of width b hold rows of up to b^2 tokens, the longest that the model is built for; others
are padded with zeros. A causal M would have to be a product of polynomials (section 3.2), which learned blocks are not.

Places are told apart, so documents of one row are not; padding is set to zero.

Shapes: B batch, S sequence, E hidden size, H heads, D head dimension, b block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headway.kernels.attention.choose import choose
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.mixers import monarch
from headway.kernels.attention.slopes import Bias
from headway.kernels.attention.words.mixers import monarch_block
from headway.kernels.rotary import Rotation
from headway.pretrain import config
from headway.pretrain.errors import JobError
from headway.pretrain.models.cost import Cost, linear
from headway.pretrain.models.layers import Noise, build_linear, narrowed
from headway.pretrain.models.mixers.base import Mixer
from headway.pretrain.models.mixers.inner import real, refuse_qk_norm, without_padding
from headway.pretrain.models.seat import Seat


class Monarch(Mixer):
    """Gates and a structured matrix over the places of a row."""

    def __init__(self, model: config.Model, seat: Seat, settings: Mapping[str, Any]) -> None:
        super().__init__(model, seat, settings)
        refuse_qk_norm(model, "monarch")
        self.block, self.head_dim = monarch_block(seat.tokens), model.head_width
        e, wide = model.hidden, model.heads * self.head_dim
        self.q, self.k, self.v = (build_linear(model, e, wide) for _ in range(3))
        self.o = build_linear(model, wide, e)
        shape = model.heads, self.block, self.block, self.block
        self.left, self.right = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))
        self.mix = choose("monarch", model.attention.kernel).compute

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
        """Returns [B, S, E], of the first `queries` places if given, and None.

        Raises JobError for rows that are longer than the model was built for.
        """
        x_BSE = narrowed(x_BSE)
        if x_BSE.shape[1] > self.block**2:
            rule = f"must not exceed the {self.block**2} places that the blocks of monarch hold"
            raise JobError("data.seq_len", x_BSE.shape[1], rule, self.block**2)
        gated = without_padding(self.k(x_BSE) * self.v(x_BSE), real(mask))
        x_BSHD = gated.unflatten(-1, (-1, self.head_dim))
        mixed = self.mix(x_BSHD, self.left.to(gated.dtype), self.right.to(gated.dtype)).flatten(2)
        return self.o(self.q(x_BSE[:, :queries]) * mixed[:, :queries]), None

    @staticmethod
    def parts(model: config.Model, seat: Seat, settings: Mapping[str, Any]) -> list[Cost]:
        e, wide, n, gains = model.hidden, model.heads * model.head_width, seat.tokens, int(model.spectral)
        block = monarch_block(seat.tokens)
        return [
            *[linear(e, wide, model.bias, n, gains)] * 3,
            linear(wide, e, model.bias, n, gains),
            Cost(2 * model.heads * block**3, monarch.flops(model.heads, model.head_width, n, block)),
        ]
