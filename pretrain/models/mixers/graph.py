"""Graph attention (Velickovic et al. 2018; GATv2: Brody et al. 2022) of tokens or patches to their neighbours.

Edges join what is at most `neighbours` places apart: tokens of a row (causal: earlier ones), patches whose rows and
columns are so near, and each with itself; tokens before the patches are linked with all, both ways. The heads'
outputs go through `o`, as everywhere here, where the paper has an ELU.

Shapes: B batch, S places, E hidden size, H heads, D head dimension, A edges.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headway.kernels.attention.choose import choose
from headway.kernels.attention.grids import graph
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.slopes import Bias
from headway.kernels.attention.words.grids import edges_of_grid, edges_of_row
from headway.kernels.rotary import Rotation
from headway.pretrain import config
from headway.pretrain.models.cost import Cost, linear
from headway.pretrain.models.layers import Noise, build_linear, narrowed
from headway.pretrain.models.mixers.base import Mixer
from headway.pretrain.models.mixers.places import first_places
from headway.pretrain.models.seat import Seat


class GAT(Mixer):
    """Scores are LeakyReLU(source . v_j + target . v_i)."""

    word = "gat"

    def __init__(self, model: config.Model, seat: Seat, settings: Mapping[str, Any]) -> None:
        super().__init__(model, seat, settings)
        self.head_dim, self.causal, self.neighbours = model.head_width, seat.causal, settings["neighbours"]
        self.first = first_places(model) if model.family == "vit" else None
        self.compute = choose(self.word, model.attention.kernel).compute
        wide = model.heads * self.head_dim
        self.v = build_linear(model, model.hidden, wide)
        self.o = build_linear(model, wide, model.hidden)
        self.build(model, wide)

    def build(self, model: config.Model, wide: int) -> None:
        """What scores are made of."""
        self.source = nn.Parameter(torch.empty(model.heads, self.head_dim))
        self.target = nn.Parameter(torch.empty(model.heads, self.head_dim))

    def scored_by(self, x_BSE: Tensor) -> tuple[Tensor, Tensor]:
        """What the kernel takes beside values and edges."""
        return self.source.to(x_BSE.dtype), self.target.to(x_BSE.dtype)

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
        x_BSE = narrowed(x_BSE)
        edges_2A, seen_BA = self.edges(x_BSE.shape[1], x_BSE.device), None
        if mask.documents is not None:
            seen_BA = mask.documents[:, edges_2A[0]] == mask.documents[:, edges_2A[1]]
        v_BSHD = self._heads(self.v(x_BSE))
        y_BSHD = self.compute(v_BSHD, edges_2A, *self.scored_by(x_BSE), seen_BA)
        return self.o(y_BSHD[:, :queries].flatten(2)), None

    def edges(self, length: int, device: torch.device) -> Tensor:
        """[2, A]: from whom, to whom."""
        if self.first is None:
            return graph.near_in_row(length, self.neighbours, self.causal, device)
        return graph.near_in_grid(math.isqrt(length - self.first), self.neighbours, self.first, device)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    @staticmethod
    def parts(model: config.Model, seat: Seat, settings: Mapping[str, Any]) -> list[Cost]:
        n, wide, gains = seat.tokens, model.heads * model.head_width, int(model.spectral)
        edges = edges_of(model, seat, settings)
        return [
            linear(model.hidden, wide, model.bias, n, gains),
            linear(wide, model.hidden, model.bias, n, gains),
            Cost(2 * wide, 4 * wide * n + 2 * wide * edges),
        ]


class GATv2(GAT):
    """Scores are score . LeakyReLU(q_i + v_j): who is read depends on who reads."""

    word = "gatv2"

    def build(self, model: config.Model, wide: int) -> None:
        self.q = build_linear(model, model.hidden, wide)
        self.score = nn.Parameter(torch.empty(model.heads, self.head_dim))

    def scored_by(self, x_BSE: Tensor) -> tuple[Tensor, Tensor]:
        return self._heads(self.q(x_BSE)), self.score.to(x_BSE.dtype)

    @staticmethod
    def parts(model: config.Model, seat: Seat, settings: Mapping[str, Any]) -> list[Cost]:
        n, wide, gains = seat.tokens, model.heads * model.head_width, int(model.spectral)
        edges = edges_of(model, seat, settings)
        return [
            linear(model.hidden, wide, model.bias, n, gains),
            linear(model.hidden, wide, model.bias, n, gains),
            linear(wide, model.hidden, model.bias, n, gains),
            Cost(wide, 4 * wide * edges),
        ]


def edges_of(model: config.Model, seat: Seat, settings: Mapping[str, Any]) -> int:
    """Edges of a row."""
    near = settings["neighbours"]
    if model.family == "vit":
        return edges_of_grid(seat.tokens, near)
    return edges_of_row(seat.tokens, near, seat.causal)
