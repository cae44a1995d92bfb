"""From tokens or images to the residual stream.

Shapes: B batch, S sequence, E hidden size, T tokens before the patches, N patches, C channels, P side of a patch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.pretrain import config
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.layers import Dropout, Embedding, Linear, Noise, build_norm
from headway.pretrain.models.positions import LearnedPositions, SinusoidalGrid, SinusoidalPositions


class TokenEmbedding(nn.Module):
    """Token rows, plus position and segment rows if the model has them; then norm, dropout.

    `tokens.weight` is [V, E], or [V, embedding size] where the table is factorised. ALBERT projects the sum, after
    norm and dropout. MobileBERT projects three tokens' rows side by side, before anything is added.
    """

    def __init__(self, model: config.Model, inputs: Inputs) -> None:
        super().__init__()
        self.trigram = model.embedding_trigram
        width = model.hidden if self.trigram else model.table_width
        rows = model.max_positions or max(inputs.length, inputs.target_length)
        self.tokens = Embedding(inputs.vocab, model.table_width)
        self.scale = math.sqrt(model.hidden) if model.embedding_scale else None
        self.positions = LearnedPositions(rows, width) if model.positions == "learned" else None
        self.sines = SinusoidalPositions(width) if model.positions == "sinusoidal" else None
        self.segments = Embedding(model.segments, width) if model.segments else None
        self.norm = build_norm(model, width) if model.embedding_norm else None
        self.dropout = Dropout(model.dropout)
        projected = model.embedding_size or self.trigram
        read = (3 if self.trigram else 1) * model.table_width
        self.project = Linear(read, model.hidden) if projected else None

    def forward(
        self,
        tokens_BS: Tensor,
        positions_S: Tensor,
        noise: Noise | None,
        segments_BS: Tensor | None = None,
    ) -> Tensor:
        """[B, S, E]; segment 0 where the model has segments and none are given."""
        x_BSE: Tensor = self.tokens(tokens_BS)
        if self.scale is not None:
            x_BSE = x_BSE * self.scale
        if self.trigram and self.project is not None:
            x_BSE = self.project(trigrams(x_BSE))
        if self.positions is not None:
            x_BSE = x_BSE + self.positions(positions_S)
        if self.sines is not None:
            x_BSE = x_BSE + self.sines(positions_S, x_BSE.dtype)
        if self.segments is not None:
            x_BSE = x_BSE + self.segments(torch.zeros_like(tokens_BS) if segments_BS is None else segments_BS)
        if self.norm is not None:
            x_BSE = self.norm(x_BSE)
        x_BSE = self.dropout(x_BSE, noise and noise.over(positions_S))
        return x_BSE if self.trigram or self.project is None else self.project(x_BSE)


def trigrams(x_BSE: Tensor) -> Tensor:
    """Of every place the rows of the next one, its own and the one before, side by side: [B, S, 3 E] (Sun et al. 2020,
    section 3.1; order as in their code). Beyond a row's ends are zeros."""
    after, before = F.pad(x_BSE[:, 1:], (0, 0, 0, 1)), F.pad(x_BSE[:, :-1], (0, 0, 1, 0))
    return torch.cat((after, x_BSE, before), -1)


class PatchEmbedding(nn.Module):
    """A linear layer over the pixels of each patch, plus positions, behind a class token and a distillation token if
    the model has them (in this order, as DeiT).

    Positions are counted from the class token: patches begin at `first`, the number of tokens before them.
    """

    def __init__(self, model: config.Model, inputs: Inputs) -> None:
        super().__init__()
        self.side = model.vision.patch
        self.grid = inputs.image // self.side
        self.patches = Linear(inputs.channels * self.side**2, model.hidden)
        self.first = model.vision.prefix_tokens
        self.class_token = _token(model.hidden) if model.vision.class_token else None
        self.distill_token = _token(model.hidden) if model.vision.distill_token else None
        rows = self.first + self.grid**2
        self.positions = LearnedPositions(rows, model.hidden) if model.positions == "learned" else None
        self.sines = SinusoidalGrid(model.hidden) if model.positions == "sinusoidal" else None
        self.norm = build_norm(model) if model.embedding_norm else None
        self.dropout = Dropout(model.dropout)

    def forward(self, pixels_BCHW: Tensor, noise: Noise | None, visible_BK: Tensor | None = None) -> Tensor:
        """[B, T + N, E], or [B, T + K, E] of the patches whose numbers are given, behind the T tokens before them."""
        pixels_BCHW = pixels_BCHW.to(self.patches.weight.dtype)  # images are fp32, models may be fp64
        x_BNE = self.patches(patchify(pixels_BCHW, self.side))
        positions_NE = self._positions(x_BNE)
        if positions_NE is not None:
            x_BNE = x_BNE + positions_NE[self.first :]
        if visible_BK is not None:
            x_BNE = x_BNE.gather(1, visible_BK.unsqueeze(-1).expand(-1, -1, x_BNE.shape[-1]))
        tokens: list[Tensor] = [t for t in (self.class_token, self.distill_token) if t is not None]
        if tokens:
            first_TE = torch.cat(tokens)
            first_TE = first_TE if positions_NE is None else first_TE + positions_NE[: self.first]
            x_BNE = torch.cat((first_TE.to(x_BNE.dtype).expand(x_BNE.shape[0], -1, -1), x_BNE), 1)
        if self.norm is not None:
            x_BNE = self.norm(x_BNE)
        dropped: Tensor = self.dropout(x_BNE, noise)
        return dropped

    def _positions(self, x_BNE: Tensor) -> Tensor | None:
        """Of the tokens before the patches, and of all patches."""
        if self.sines is not None:
            return self.sines(self.grid, self.grid, x_BNE.dtype, x_BNE.device, self.first)
        if self.positions is None:
            return None
        places = torch.arange(self.positions.num_embeddings, device=x_BNE.device)
        return self.positions(places).to(x_BNE.dtype)


def _token(width: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(1, width))


def patchify(pixels_BCHW: Tensor, side: int) -> Tensor:
    """Pixels of non-overlapping patches, row by row: [B, N, C P P], in the order of a convolution's weight."""
    return torch.nn.functional.unfold(pixels_BCHW, side, stride=side).transpose(1, 2)


def unpatchify(patches_BNP: Tensor, side: int, channels: int) -> Tensor:
    """The images that `patchify` cut: [B, C, H, W], square."""
    size = math.isqrt(patches_BNP.shape[1]) * side
    return torch.nn.functional.fold(patches_BNP.transpose(1, 2), (size, size), side, stride=side)
