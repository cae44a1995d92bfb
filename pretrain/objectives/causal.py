"""Causal language modelling: every token is predicted from those before it. Also with a prefix that all may see
(Raffel et al. 2020, section 3.2), and with rows rearranged for filling in the middle (Bavarian et al. 2022).

Shapes: B batch, S sequence, E hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from headway.kernels.cross_entropy import IGNORE
from headway.pretrain.config import Job
from headway.pretrain.data.corruption.denoisers import prefix_lengths
from headway.pretrain.data.corruption.infill import fim
from headway.pretrain.data.samples import Rows
from headway.pretrain.data.specials import Specials
from headway.pretrain.engine import Batch
from headway.pretrain.models.columns import Columns
from headway.pretrain.models.gpt import GPT
from headway.pretrain.models.hidden import Hidden
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.layers import Linear, Noise, narrowed
from headway.pretrain.models.maps import attention_maps
from headway.pretrain.objectives import choices
from headway.pretrain.objectives.base import (
    ALL,
    ChunkedLoss,
    LossOutput,
    Objective,
    passed,
    valid,
)


class CausalLM(Objective):
    """A GPT with a head, and the loss of next tokens.

    A tied head owns no weight: it reads `model.embed.tokens.weight`. An untied one owns `head.weight`.
    """

    model: GPT

    def __init__(self, job: Job, inputs: Inputs, specials: Specials | None = None) -> None:
        """
        Args:
            job: its model, objective and `data.documents` are read.
            inputs: vocabulary and length of a row.
            specials: ids that rows are rearranged with.
        """
        shape = job.model
        super().__init__(GPT(shape, inputs), shape)
        self.head = None if shape.tied else Linear(shape.hidden, inputs.vocab, bias=False)
        self.head_scale = shape.head_scale
        self.loss = ChunkedLoss(job.objective)
        self.isolate = job.data.documents == "isolate"
        self.settings, self.specials = job.objective, specials
        self.level = math.log(inputs.vocab)

    @property
    def head_weight(self) -> Tensor:
        """[V, E]"""
        return self.model.embed.tokens.weight if self.head is None else self.head.weight

    def through(
        self,
        tower: int,
        batch: Batch,
        noise: Noise | None = None,
        before: Tensor | None = None,
        embedded: Tensor | None = None,
        columns: Mapping[str, Columns] = ALL,
    ) -> Hidden:
        """Of a batch: `tokens` and `labels` int64 [B, S] (IGNORE where not scored); `documents` [B, S] and `prefix` [B]
        where they are needed."""
        documents, here = batch.get("documents"), columns.get("tokens")
        asked = documents, here, noise, batch.get("prefix"), embedded, batch
        hidden: Hidden = self.model(batch["tokens"], *asked)
        return hidden

    def score(self, batch: Batch, hidden: Hidden, noise: Noise | None = None) -> LossOutput:
        labels_BS = batch["labels"]
        losses = self.loss(
            self.read(hidden.final), self.head_weight, labels_BS, teacher=self.taught_words(batch)
        )
        terms, metrics = self.word_terms(losses, batch, noise, valid(labels_BS))
        each_BS, reaches = losses.each.view_as(labels_BS), (choices.here, choices.onward)
        self.add_choices(terms, metrics, hidden.sides, each_BS, labels_BS != IGNORE, *reaches)
        return self.output(terms, metrics, batch, hidden, noise)

    def read(self, final: Tensor) -> Tensor:
        return final if self.head_scale == 1 else final * self.head_scale

    def logits(self, tokens_BS: Tensor, at: int | None = None) -> Tensor:
        """Logits in the dtype of matrix products, [B, S, V], or [B, V] after the token at place `at` alone."""
        final = narrowed(self.read(self.model(tokens_BS).final))
        return nn.functional.linear(final if at is None else final[:, at], self.head_weight)

    def attention_maps(self, batch: Batch) -> Tensor:
        return attention_maps(self.model, batch["tokens"])

    def collate(self, rows: Rows) -> Batch:
        """A batch from rows of `TokenRows` or `HeldoutRows`."""
        array, documents = rows["tokens"], rows.get("documents")
        training = "scored" not in rows
        if self.settings.infill.rate and training:
            assert self.specials is not None
            assert documents is not None
            array, documents = fim(array, documents, rows["key"], self.settings.infill, self.specials)
        tokens = torch.from_numpy(array)
        labels = tokens[:, 1:].clone()
        if not training:
            scored = torch.from_numpy(rows["scored"])  # of rows, or of their tokens
            labels.masked_fill_(~scored.view(len(labels), -1), IGNORE)
        batch = passed(rows) | {"tokens": tokens[:, :-1].contiguous(), "labels": labels}
        if self.settings.name == "prefix":
            batch["prefix"] = torch.from_numpy(prefix_lengths(rows["key"], labels.shape[1]))
            places = torch.arange(labels.shape[1])
            labels.masked_fill_(places < batch["prefix"][:, None] - 1, IGNORE)
        if self.isolate and documents is not None:
            batch["documents"] = torch.from_numpy(documents)[:, :-1].contiguous()
        return batch

    def counts(self, batch: Batch) -> dict[str, int]:
        tokens = batch["tokens"]
        counts = {"tokens": int(valid(batch["labels"])), "rows": len(tokens), "read": tokens.numel()}
        return self.with_counts(batch, counts)
