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
from headway.pretrain.models.columns import Columns
from headway.pretrain.models.hidden import Hidden
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.layers import Linear, Noise
from headway.pretrain.models.maps import attention_maps
from headway.pretrain.models.moe import MoE
from headway.pretrain.models.vit import ViT
from headway.pretrain.objectives import choices
from headway.pretrain.objectives.base import ALL, LossOutput, Mean, Objective, passed, real_rows, valid
from headway.pretrain.objectives.distill import names
from headway.pretrain.objectives.soft_classes import SoftClasses


class Classifier(Objective):
    """A ViT and a linear layer over its class token or the mean of its patches; a second one over the distillation
    token, if there is one (DeiT, Touvron et al. 2021).

    Labels may be mixtures of two (mixup, cutmix): `partner` has the share 1 - `share`. Two heads answer with the mean
    of their logits (as timm). In training with a teacher the one learns labels, the other the teacher's answers; a
    single head learns both.

    Attributes:
        soft: how to learn from the teacher's logits, where a batch has them; None does not.
    """

    model: ViT
    scored = "rows"

    def __init__(self, job: Job, inputs: Inputs) -> None:
        shape = job.model
        super().__init__(ViT(shape, inputs), shape)
        self.head = Linear(shape.hidden, inputs.classes)
        distilled = shape.vision.distill_token
        self.head_distill = Linear(shape.hidden, inputs.classes) if distilled else None
        self.soft: SoftClasses | None = None
        self.pool, self.first = job.objective.pool, shape.vision.prefix_tokens
        self.smoothing = job.objective.label_smoothing
        self.places = inputs.length
        self.level = math.log(max(1, inputs.classes))  # an encoder that comes without a head has no classes
        # Only the tokens before the patches are read, so the last block computes nothing else; what balances experts or
        # holds entropies is about all patches.
        last: Any = self.model.blocks[-1]
        whole = isinstance(last.mlp, MoE) or shape.attention.entropy_penalty
        self.outputs = self.first if self.pool == "first" and not whole else None

    def through(
        self,
        tower: int,
        batch: Batch,
        noise: Noise | None = None,
        before: Tensor | None = None,
        embedded: Tensor | None = None,
        columns: Mapping[str, Columns] = ALL,
    ) -> Hidden:
        """Of a batch: `pixels` [B, C, H, W], `labels` int64 [B]; `partner` [B] and `share` [B] if mixed;
        a teacher's logits [B, Y] (`distill.names.LOGITS`) if one has seen the same pixels."""
        hidden: Hidden = self.model(
            batch["pixels"], None, noise, self.outputs, embedded, columns.get("pixels"), batch
        )
        return hidden

    def score(self, batch: Batch, hidden: Hidden, noise: Noise | None = None) -> LossOutput:
        """Without noise, as held-out images are scored, the loss is that of the labels alone, and not smoothed."""
        labels_B, training = batch["labels"], noise is not None
        logits_BY, taught_BY = self._heads(hidden.final)
        both_BY = self._answer(logits_BY, taught_BY)
        metrics = {"accuracy": Mean((both_BY.argmax(1) == labels_B).sum(), valid(labels_B))}
        soft, teacher_BY = self.soft, batch.get(names.LOGITS)
        if soft is None or teacher_BY is None:
            loss_B = self.task_weight(noise) * self._label_loss(both_BY, batch, training)
        else:
            loss_B = self._label_loss(logits_BY if training else both_BY, batch, training)
            soft_B = torch.where(labels_B != IGNORE, soft.loss(taught_BY, teacher_BY), 0)
            metrics["soft_loss"] = Mean(soft_B.detach().sum(), valid(labels_B))
            if training:
                loss_B = soft.task * loss_B + soft.weight * soft_B
        terms = {"rows": loss_B.sum()}
        each = loss_B.detach()[:, None], (labels_B != IGNORE)[:, None]
        self.add_choices(terms, metrics, hidden.sides, *each, choices.whole, choices.whole)
        return self.output(terms, metrics, batch, hidden, noise)

    def _label_loss(self, logits_BY: Tensor, batch: Batch, training: bool) -> Tensor:
        """Cross-entropy [B] with the labels, mixed if the batch is."""
        smoothing = self.smoothing if training else 0.0

        def against(labels_B: Tensor) -> Tensor:
            return F.cross_entropy(
                logits_BY, labels_B, ignore_index=IGNORE, reduction="none", label_smoothing=smoothing
            )

        loss_B = against(batch["labels"])
        if "partner" not in batch:
            return loss_B
        share_B = batch["share"].to(loss_B.dtype)
        return share_B * loss_B + (1 - share_B) * against(batch["partner"])

    def logits(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, Y], fp32 or fp64; the mean of both heads, where there are two."""
        return self.of(self.model(pixels_BCHW, outputs=self.outputs).final)

    def of(self, final: Tensor) -> Tensor:
        """The same, of last hidden states."""
        return self._answer(*self._heads(final))

    def _heads(self, final: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the head that learns labels, and of the one that learns from a teacher: the same without a
        distillation token."""
        pooled_BE = final[:, 0] if self.pool == "first" else final[:, self.first :].mean(1)
        logits_BY = _widened(self.head(pooled_BE))
        if self.head_distill is None:
            return logits_BY, logits_BY
        return logits_BY, _widened(self.head_distill(final[:, self.first - 1]))

    def _answer(self, logits_BY: Tensor, taught_BY: Tensor) -> Tensor:
        return logits_BY if self.head_distill is None else (logits_BY + taught_BY) / 2

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


def _widened(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
