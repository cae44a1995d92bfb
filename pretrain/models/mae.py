"""The small decoder of masked autoencoding: from visible patches to all pixels (He et al. 2022, section 3).

Shapes: B batch, N patches, K visible patches, E hidden size of the encoder, D of the decoder, P pixels of a patch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headway.kernels.attention.masks import Mask
from headway.pretrain import config
from headway.pretrain.models.columns import Columns
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.layers import Linear, Noise
from headway.pretrain.models.positions import SinusoidalGrid
from headway.pretrain.models.transformer import Tower


def decoder_shape(model: config.Model, mae: config.Reconstruct) -> config.Model:
    """The decoder's shape: the encoder's kind of blocks, dense, of its own depth and width."""
    own = {"layers": mae.layers, "hidden": mae.hidden, "heads": mae.heads, "kv_heads": None, "head_dim": None}
    plain = {"ffn": None, "stochastic_depth": 0.0, "unique_layers": None, "experts": config.Experts()}
    return model.model_copy(update=own | plain)


class PixelDecoder(Tower):
    """Encoded visible patches and mask tokens, in place; a few blocks; the pixels of every patch."""

    def __init__(self, model: config.Model, mae: config.Reconstruct, inputs: Inputs) -> None:
        shape = decoder_shape(model, mae)
        tokens = (inputs.image // model.vision.patch) ** 2 + model.vision.prefix_tokens
        super().__init__(shape, causal=False, embed=Linear(model.hidden, mae.hidden), tokens=tokens)
        grid, self.first = inputs.image // model.vision.patch, model.vision.prefix_tokens
        self.mask_token = nn.Parameter(torch.empty(1, mae.hidden))
        self.positions = SinusoidalGrid(mae.hidden)
        self.head = Linear(mae.hidden, inputs.channels * model.vision.patch**2)
        self.grid = grid

    def forward(
        self,
        encoded_BKE: Tensor,
        visible_BK: Tensor,
        noise: Noise | None = None,
        columns: Columns | None = None,
    ) -> Tensor:
        """Pixels of all patches [B, N, P], from the encoder's output (class token first, if there is one).

        `columns`: which of these places blocks compute here; all if None.
        """
        return self.pixels(self.decode(self.fill(encoded_BKE, visible_BK, columns), noise, columns))

    def fill(self, encoded_BKE: Tensor, visible_BK: Tensor, columns: Columns | None = None) -> Tensor:
        """What goes into the first block: [B, 1 + N, D] with the class token, if there is one; or some columns."""
        x_BKD = self.embed(encoded_BKE)
        head, body = x_BKD[:, : self.first], x_BKD[:, self.first :]
        index = visible_BK.unsqueeze(-1).expand(-1, -1, body.shape[-1])
        blank = self.mask_token.to(body.dtype).expand(body.shape[0], self.grid**2, -1)
        x_BND = torch.cat((head, blank.scatter(1, index, body)), 1)
        x_BND = x_BND + self.positions(self.grid, self.grid, x_BND.dtype, x_BND.device, self.first)
        return x_BND if columns is None else columns.cut(x_BND)

    def decode(self, x_BND: Tensor, noise: Noise | None = None, columns: Columns | None = None) -> Tensor:
        """Blocks and final norm, of the columns that `fill` gave."""
        return self.run(x_BND, Columns.of(columns, x_BND), Mask(False), noise)[0]

    def pixels(self, final_BND: Tensor) -> Tensor:
        """[B, N, P]"""
        pixels: Tensor = self.head(final_BND[:, self.first :])
        return pixels
