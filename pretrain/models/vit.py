"""ViT: an encoder of image patches (Dosovitskiy et al. 2021).

Shapes: B batch, C channels, T tokens before the patches, N patches, E hidden size.
"""

from __future__ import annotations

from torch import Tensor

from headway.kernels.attention.masks import Mask
from headway.pretrain import config
from headway.pretrain.models.columns import Columns
from headway.pretrain.models.embeddings import PatchEmbedding
from headway.pretrain.models.hidden import Hidden
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.layers import Noise
from headway.pretrain.models.taps import Taught
from headway.pretrain.models.transformer import Tower


class ViT(Tower):
    """Patches, a stack of blocks, a final norm (pre-norm models only)."""

    def __init__(self, model: config.Model, inputs: Inputs) -> None:
        super().__init__(model, causal=False, embed=PatchEmbedding(model, inputs), tokens=inputs.length)

    def forward(
        self,
        pixels_BCHW: Tensor,
        visible_BK: Tensor | None = None,
        noise: Noise | None = None,
        outputs: int | None = None,
        embedded_BNE: Tensor | None = None,
        columns: Columns | None = None,
        taught: Taught | None = None,
    ) -> Hidden:
        """
        Args:
            pixels_BCHW: normalised images.
            visible_BK: int64, numbers of the patches that are read; all if None.
            noise: what dropout depends on; None drops nothing.
            outputs: how many places of the result are wanted, from the first on; all if None.
            embedded_BNE: what goes into the first block (the columns that are here), where something else has
                embedded the patches.
            columns: which of the places (tokens before the patches first) blocks compute here; all if None.
            taught: what a teacher gave, for taps of blocks.

        Returns:
            `final` [B, T + N, E]: the class token and the distillation token, if the model has them, and the patches
            that are read, in their order; or as many of these as are wanted.
        """
        x_BNE = embedded_BNE
        if x_BNE is None:
            x_BNE = self.embed(pixels_BCHW, noise, visible_BK)
            x_BNE = x_BNE if columns is None else columns.cut(x_BNE)
        here = Columns.of(columns, x_BNE)
        return Hidden(*self.run(x_BNE, here, Mask(False), noise, outputs=outputs, taught=taught))
