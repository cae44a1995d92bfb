"""Masked autoencoding of images: the encoder reads a quarter of the patches, a small decoder paints the rest
(He et al. 2022).

Shapes: B batch, C channels, N patches, K visible patches, P pixels of a patch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from headway.kernels import random
from headway.pretrain.config import Job
from headway.pretrain.data.samples import Rows
from headway.pretrain.engine import Batch
from headway.pretrain.models.columns import Columns
from headway.pretrain.models.embeddings import patchify, unpatchify
from headway.pretrain.models.hidden import Hidden
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.layers import Noise
from headway.pretrain.models.mae import PixelDecoder
from headway.pretrain.models.maps import attention_maps
from headway.pretrain.models.vit import ViT
from headway.pretrain.objectives.base import ALL, LossOutput, Objective, passed, real_rows

EPS = 1e-6
"""Added to a patch's variance (He et al.'s code)."""


class MaskedAutoencoder(Objective):
    """A ViT that sees some patches, and a decoder that predicts the pixels of the others.

    The loss is the squared error per pixel, of each patch normalised by its own mean and deviation if the job says so.
    """

    scored = "patches"
    towers = ("model", "decoder")

    def __init__(self, job: Job, inputs: Inputs) -> None:
        shape, self.settings = job.model, job.objective.mae
        super().__init__(ViT(shape, inputs), shape)
        self.decoder = PixelDecoder(shape, self.settings, inputs)
        self.side, self.channels = shape.vision.patch, inputs.channels
        self.patches = (inputs.image // self.side) ** 2
        self.visible = max(1, int(self.patches * (1 - self.settings.rate)))
        self.first = shape.vision.prefix_tokens

    def through(
        self,
        tower: int,
        batch: Batch,
        noise: Noise | None = None,
        before: Tensor | None = None,
        embedded: Tensor | None = None,
        columns: Mapping[str, Columns] = ALL,
    ) -> Hidden:
        """Of a batch: `pixels` [B, C, H, W], `visible` int64 [B, K], `scored` bool [B, N]."""
        visible_BK = batch["visible"]
        if tower == 0:
            hidden: Hidden = self.model(
                batch["pixels"], visible_BK, noise, None, embedded, columns.get("visible")
            )
            return hidden
        here = columns.get("pixels")
        if embedded is None:
            assert before is not None
            embedded = self.decoder.fill(before, visible_BK, here)
        return Hidden(self.decoder.decode(embedded, noise, here), [])

    def score(self, batch: Batch, hidden: Hidden, noise: Noise | None = None) -> LossOutput:
        pixels = batch["pixels"]
        painted_BNP = self.decoder.pixels(hidden.final)
        target_BNP = self.target(pixels.to(torch.promote_types(pixels.dtype, painted_BNP.dtype)))
        error_BN = (painted_BNP.to(target_BNP.dtype) - target_BNP).square().mean(-1)
        total = torch.where(batch["scored"], error_BN, 0).sum()
        return self.output({"patches": total}, {}, batch, hidden, noise)

    def target(self, pixels_BCHW: Tensor) -> Tensor:
        """What is predicted, [B, N, P]."""
        patches_BNP = patchify(pixels_BCHW, self.side)
        if not self.settings.normalise:
            return patches_BNP
        mean, variance = patches_BNP.mean(-1, keepdim=True), patches_BNP.var(-1, keepdim=True)
        return (patches_BNP - mean) / (variance + EPS).sqrt()

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images as the encoder sees them (NaN where hidden) and as they are painted, both [B, C, H, W].

        Normalised patches are painted with the true patch's mean and deviation, as in the paper's figures.
        """
        pixels, visible_BK = batch["pixels"], batch["visible"]
        painted = self.decoder(self.model(pixels, visible_BK).final, visible_BK).to(pixels.dtype)
        true_BNP = patchify(pixels, self.side)
        if self.settings.normalise:
            deviation = (true_BNP.var(-1, keepdim=True) + EPS).sqrt()
            painted = painted * deviation + true_BNP.mean(-1, keepdim=True)
        hidden_BN1 = hidden_patches(visible_BK, self.patches).unsqueeze(-1)
        seen = torch.where(hidden_BN1, float("nan"), true_BNP)
        whole = torch.where(hidden_BN1, painted, true_BNP)
        return tuple(unpatchify(x, self.side, self.channels) for x in (seen, whole))  # type: ignore[return-value]

    def attention_maps(self, batch: Batch) -> Tensor:
        """Of the encoder, over all patches."""
        return attention_maps(self.model, batch["pixels"])

    def collate(self, rows: Rows) -> Batch:
        """A batch from rows of `ImageSamples`; which patches are visible is a function of the sample's key."""
        keys = torch.from_numpy(rows["key"])[:, None]
        places = torch.arange(self.patches)[None]
        order = random.uniform(keys, places).argsort(1)
        visible = order[:, : self.visible].sort(1).values
        batch = passed(rows) | {"pixels": torch.from_numpy(rows["pixels"]), "visible": visible}
        batch["scored"] = hidden_patches(visible, self.patches) & real_rows(rows)[:, None]
        return batch

    def counts(self, batch: Batch) -> dict[str, int]:
        rows = len(batch["pixels"])
        read = rows * (self.first + self.visible)
        return {"patches": int(batch["scored"].sum()), "rows": rows, "read": read}


def hidden_patches(visible_BK: Tensor, patches: int) -> Tensor:
    """Which patches are not visible, bool [B, N]."""
    hidden = torch.ones(visible_BK.shape[0], patches, dtype=torch.bool, device=visible_BK.device)
    return hidden.scatter(1, visible_BK, False)
