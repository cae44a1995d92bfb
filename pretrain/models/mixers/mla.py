"""Multi-head latent attention (DeepSeek-V2, DeepSeek-AI 2024, section 2.1).

A place is kept as a latent of width `rank`, from which every head makes its keys and values, and one key of
`rotary_dim` features that positions turn and all heads share. Queries may have a latent of their own. As in DeepSeek's
models latents are RMS-normalised, and what is made from them has no bias. The head dimension D is the width of values
and of the unturned part of queries and keys, which are D + `rotary_dim` wide.

Without rotary positions nothing turns the shared features: they are a key that all heads have in common, and positions
come from elsewhere (a table, a bias of the scores). DeepSeek's weights turn neighbours (2i, 2i + 1), these the two
halves: a permutation of rows of W^QR and W^KR apart.

Shapes: B batch, S sequence, M keys, E hidden size, H heads, D head dimension, R rotary dimension, C rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headway.kernels.attention.dense import WeightDropout
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.mixers import latent
from headway.kernels.attention.slopes import Bias, part_of
from headway.kernels.attention.words.mixers import latent_widths
from headway.kernels.rotary import Rotation, rotate_both
from headway.pretrain import config
from headway.pretrain.errors import JobError
from headway.pretrain.models.attention import Beside, Core
from headway.pretrain.models.cost import Cost, linear
from headway.pretrain.models.layers import Dropout, Noise, RMSNorm, build_linear, matrix, narrowed
from headway.pretrain.models.mixers.base import Mixer
from headway.pretrain.models.mixers.inner import refuse_qk_norm
from headway.pretrain.models.seat import Seat


class MLA(Mixer):
    """Attention whose keys and values are made from a narrow latent."""

    def __init__(self, model: config.Model, seat: Seat, settings: Mapping[str, Any]) -> None:
        """Raises JobError for widths that cannot be."""
        super().__init__(model, seat, settings)
        refuse_qk_norm(model, "mla")
        self.head_dim = dim = model.head_width
        rank, query_rank, self.rotary_dim = widths(model, settings)
        made = model.model_copy(update={"bias": False})
        self.q_down = build_linear(model, model.hidden, query_rank) if query_rank else None
        self.q_norm = RMSNorm(query_rank, model.norm_eps) if query_rank else None
        self.q = build_linear(made, query_rank or model.hidden, model.heads * (dim + self.rotary_dim))
        self.kv_down = build_linear(model, model.hidden, rank)
        self.kv_norm = RMSNorm(rank, model.norm_eps)
        self.k = build_linear(made, rank, model.heads * dim)
        self.v = build_linear(made, rank, model.heads * dim)
        self.shared_k = build_linear(model, model.hidden, self.rotary_dim) if self.rotary_dim else None
        self.o = build_linear(model, model.heads * dim, model.hidden)
        self.dropout = Dropout(model.attention.dropout)
        self.first_head = 0  # global index of the first head here
        self.absorbs = model.attention.kernel == "absorbed"
        self.core = Core(model.attention, "mla", seat.layer)
        if self.core.scale is None:
            self.core.scale = (dim + self.rotary_dim) ** -0.5  # of latents too
        self.wants_entropy = model.attention.entropy_penalty != 0

    def forward(
        self,
        x_BSE: Tensor,
        mask: Mask,
        turn: Rotation | None = None,
        noise: Noise | None = None,
        bias_HSM: Bias | None = None,
        memory_BME: Tensor | None = None,
        queries: int | None = None,
    ) -> tuple[Tensor, Beside]:
        """As `Attention.forward`, of a sequence to itself."""
        x_BSE = narrowed(x_BSE)
        bias_HSM = None if bias_HSM is None else part_of(bias_HSM, slice(0, queries))
        q_BHSD, own_q_BHSR = self._queries(x_BSE[:, :queries])
        c_BMC, shared_k_BMR = self._latents(x_BSE)
        turned_q_BHSR, turned_k_BMR = self._turned(own_q_BHSR, shared_k_BMR, turn)
        if self.absorbs:
            q_BHSD, k_BHMD, v_BHMD = latent.absorbed(
                q_BHSD, turned_q_BHSR, c_BMC, turned_k_BMR, self._up(self.k)
            )
        else:
            q_BHSD, v_BHMD = torch.cat((q_BHSD, turned_q_BHSR), -1), self._heads(self.v(c_BMC))
            k_BHMD = latent.with_shared(self._heads(self.k(c_BMC)), turned_k_BMR)
        dropout = self._weight_dropout(noise, q_BHSD.shape[2])
        y_BHSD = self.core(q_BHSD, k_BHMD, v_BHMD, mask, dropout, bias_HSM, None)
        if self.absorbs:
            y_BHSD = torch.einsum("bhsc,hdc->bhsd", y_BHSD, self._up(self.v))
        entropy = self.core.entropy(q_BHSD, k_BHMD, mask, bias_HSM) if self.wants_entropy else None
        return self.o(y_BHSD.transpose(1, 2).flatten(2)), Beside(entropy)

    def _queries(self, x_BSE: Tensor) -> tuple[Tensor, Tensor]:
        """[B, H, S, D] and, to be turned, [B, H, S, R]."""
        if self.q_down is not None and self.q_norm is not None:
            x_BSE = self.q_norm(self.q_down(x_BSE))
        both = self.q(x_BSE).unflatten(-1, (-1, self.head_dim + self.rotary_dim)).transpose(1, 2)
        q_BHSD, own_BHSR = both.split((self.head_dim, self.rotary_dim), -1)
        return q_BHSD, own_BHSR

    def _latents(self, x_BME: Tensor) -> tuple[Tensor, Tensor]:
        """[B, M, C] and, to be turned, [B, M, R]."""
        shared_BMR = x_BME[..., :0] if self.shared_k is None else self.shared_k(x_BME)
        return self.kv_norm(self.kv_down(x_BME)), shared_BMR

    def _turned(self, q_BHSR: Tensor, k_BMR: Tensor, turn: Rotation | None) -> tuple[Tensor, Tensor]:
        """Features turned by R / 2 of the D / 2 angles of a head, evenly spread: where R divides D, by base^(-2i/R)."""
        if turn is None or self.rotary_dim == 0:
            return q_BHSR, k_BMR
        angles = [i * self.head_dim // self.rotary_dim for i in range(self.rotary_dim // 2)]
        q_BHSR, k_B1MR = rotate_both(q_BHSR, k_BMR[:, None], Rotation(*(t[..., angles] for t in turn)))
        return q_BHSR, k_B1MR[:, 0]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _up(self, layer: nn.Linear) -> Tensor:
        """A linear layer's matrix for every head, [H, D, C]."""
        return matrix(layer).unflatten(0, (-1, self.head_dim))

    def _weight_dropout(self, noise: Noise | None, length: int) -> WeightDropout | None:
        p = self.dropout.p
        if noise is None or p == 0:
            return None
        return WeightDropout(p, self.dropout.key(noise), noise.slots_B, noise.places(length), self.first_head)

    @staticmethod
    def parts(model: config.Model, seat: Seat, settings: Mapping[str, Any]) -> list[Cost]:
        e, wide, n, gains = model.hidden, model.heads * model.head_width, seat.tokens, int(model.spectral)
        rank, query_rank, rotary = widths(model, settings)
        seen = n * (n + 1) // 2 if seat.causal else n * n
        queries = wide + model.heads * rotary
        down = [(e, query_rank)] if query_rank else []
        return [
            *(linear(i, o, model.bias, n, gains) for i, o in (*down, (e, rank), (wide, e))),
            *(
                linear(i, o, False, n, gains)
                for i, o in ((query_rank or e, queries), (rank, wide), (rank, wide))
            ),
            linear(e, rotary, model.bias, n, gains) if rotary else Cost(),
            Cost(rank + query_rank),  # norms
            Cost(flops=2 * model.heads * seen * (2 * model.head_width + rotary)),
        ]


def widths(model: config.Model, settings: Mapping[str, Any]) -> tuple[int, int, int]:
    """Rank, rank of queries (0: none) and rotary dimension.

    Raises:
        JobError: R is odd, or greater than D, whose angles it is turned by.
    """
    dim = model.head_width
    rank, query_rank, rotary = latent_widths(dim, settings)
    if rotary % 2 or rotary > dim:
        rule = f"must be even, and at most the head dimension {dim}, whose angles turn its features"
        raise JobError("model.attention.rotary_dim", rotary, rule, min(rotary, dim) // 2 * 2)
    return rank, query_rank, rotary
