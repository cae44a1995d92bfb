"""Supervised classification of images.

Shapes: B batch, N patches, E hidden size, Y classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.cross_entropy import IGNORE
from headway.pretrain.config import Job
from headway.pretrain.data.samples import Rows
from headway.pretrain.engine import Batch
from headway.pretrain.models.attention import attention_maps
from headway.pretrain.models.columns import Columns
from headway.pretrain.models.hidden import Hidden
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.layers import Linear, Noise
from headway.pretrain.models.moe import MoE
from headway.pretrain.models.vit import ViT
from headway.pretrain.objectives import choices
from headway.pretrain.objectives.base import ALL, LossOutput, Mean, Objective, passed, real_rows, valid


class Classifier(Objective):
    """A ViT and a linear layer over its class token or the mean of its patches.

    Labels may be mixtures of two (mixup, cutmix): `partner` has the share 1 - `share`.
    """

    model: ViT
    scored = "rows"

    def __init__(self, job: Job, inputs: Inputs) -> None:
        shape = job.model
        super().__init__(ViT(shape, inputs), shape)
        self.head = Linear(shape.hidden, inputs.classes)
        self.pool, self.first = job.objective.pool, int(shape.vision.class_token)
        self.smoothing = job.objective.label_smoothing
        self.places = inputs.length
        self.level = math.log(inputs.classes)
        # Only the class token is read, so the last block computes nothing else; what balances experts or holds
        # entropies is about all patches.
        last: Any = self.model.blocks[-1]
        whole = isinstance(last.mlp, MoE) or shape.attention.entropy_penalty
        self.outputs = 1 if self.pool == "first" and not whole else None

    def through(
        self,
        tower: int,
        batch: Batch,
        noise: Noise | None = None,
        before: Tensor | None = None,
        embedded: Tensor | None = None,
        columns: Mapping[str, Columns] = ALL,
    ) -> Hidden:
        """Of a batch: `pixels` [B, C, H, W], `labels` int64 [B]; `partner` [B] and `share` [B] if mixed."""
        hidden: Hidden = self.model(
            batch["pixels"], None, noise, self.outputs, embedded, columns.get("pixels"), batch
        )
        return hidden

    def score(self, batch: Batch, hidden: Hidden, noise: Noise | None = None) -> LossOutput:
        labels_B = batch["labels"]
        logits_BY = self.of(hidden.final)
        smoothing = self.smoothing if noise is not None else 0.0
        loss_B = F.cross_entropy(
            logits_BY, labels_B, ignore_index=IGNORE, reduction="none", label_smoothing=smoothing
        )
        if "partner" in batch:
            other_B = F.cross_entropy(
                logits_BY, batch["partner"], ignore_index=IGNORE, reduction="none", label_smoothing=smoothing
            )
            share_B = batch["share"].to(loss_B.dtype)
            loss_B = share_B * loss_B + (1 - share_B) * other_B
        metrics = {"accuracy": Mean((logits_BY.argmax(1) == labels_B).sum(), valid(labels_B))}
        terms = {"rows": loss_B.sum()}
        each = loss_B.detach()[:, None], (labels_B != IGNORE)[:, None]
        self.add_choices(terms, metrics, hidden.sides, *each, choices.whole, choices.whole)
        return self.output(terms, metrics, batch, hidden, noise)

    def logits(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, Y], fp32 or fp64."""
        return self.of(self.model(pixels_BCHW, outputs=self.outputs).final)

    def of(self, final: Tensor) -> Tensor:
        """Logits of classes, of last hidden states: [B, Y], fp32 or fp64."""
        pooled_BE = final[:, 0] if self.pool == "first" else final[:, self.first :].mean(1)
        logits = self.head(pooled_BE)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def attention_maps(self, batch: Batch) -> Tensor:
        return attention_maps(self.model, batch["pixels"])

    def collate(self, rows: Rows) -> Batch:
        """A batch from rows of `ImageSamples`."""
        batch = passed(rows) | {"pixels": torch.from_numpy(rows["pixels"])}
        real = real_rows(rows)
        batch["labels"] = torch.from_numpy(rows["label"]).masked_fill(~real, IGNORE)
        if "partner" in rows:
            batch["partner"] = torch.from_numpy(rows["partner"]).masked_fill(~real, IGNORE)
            batch["share"] = torch.from_numpy(rows["share"])
        return batch

    def counts(self, batch: Batch) -> dict[str, int]:
        counts = {"rows": int(valid(batch["labels"])), "read": len(batch["labels"]) * self.places}
        return self.with_counts(batch, counts)
