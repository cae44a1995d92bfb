"""Masked language modelling (Devlin et al. 2019), alone or with next-sentence or sentence-order prediction.

Shapes: B batch, S sequence, E hidden size, V vocabulary, M predicted tokens of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.kernels import glu
from headway.kernels.cross_entropy import IGNORE
from headway.pretrain import config
from headway.pretrain.config import Job
from headway.pretrain.data.corruption.masking import mask_tokens
from headway.pretrain.data.samples import Rows
from headway.pretrain.data.specials import Specials
from headway.pretrain.engine import Batch
from headway.pretrain.models.bert import BERT
from headway.pretrain.models.columns import Columns
from headway.pretrain.models.hidden import Hidden
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.layers import Linear, Noise, build_norm, narrowed
from headway.pretrain.models.maps import attention_maps
from headway.pretrain.objectives import choices
from headway.pretrain.objectives.base import (
    ALL,
    ChunkedLoss,
    LossOutput,
    Mean,
    Objective,
    passed,
    real_rows,
    valid,
)


class MaskedHead(nn.Module):
    """BERT's head: a layer with activation and norm, then words with a bias.

    Words multiply the table's rows, or `weight` where it is not tied; beside a table that is narrower than what they
    multiply, `extra` (MobileBERT).
    """

    def __init__(self, model: config.Model, vocab: int) -> None:
        super().__init__()
        width, beside = model.word_width, model.word_width - model.table_width
        self.activation = model.activation if not model.gated else "gelu"
        self.transform = Linear(model.hidden, width)
        affine = model.norm == "affine"
        self.norm = build_norm(model.model_copy(update={"norm": "layernorm"}) if affine else model, width)
        self.bias = nn.Parameter(torch.empty(vocab))
        self.weight = None if model.tied else nn.Parameter(torch.empty(vocab, width))
        self.extra = nn.Parameter(torch.empty(vocab, beside)) if model.tied and beside else None

    def forward(self, hidden: Tensor) -> Tensor:
        """What the words' weights read: [..., width]."""
        out: Tensor = self.norm(glu.PLAIN[self.activation](self.transform(narrowed(hidden))))
        return out


class MaskedLM(Objective):
    """A BERT, its head, and a classifier of pairs if rows are pairs of segments."""

    model: BERT

    def __init__(
        self, job: Job, inputs: Inputs, specials: Specials | None = None, starts: np.ndarray | None = None
    ) -> None:
        """
        Args:
            job: its model and objective are read.
            inputs: vocabulary and length of a row.
            specials: ids of mask and separators.
            starts: bool [V], pieces that begin a word, for whole-word masking.
        """
        shape = job.model
        super().__init__(BERT(shape, inputs), shape)
        self.head = MaskedHead(shape, inputs.vocab)
        self.pair = Linear(shape.hidden, 2) if job.objective.masking.pairs != "none" else None
        if self.pair is None and self.model.pooler is not None:
            self.model.pooler.requires_grad_(
                False
            )  # nothing reads it here, and DDP would wait for its gradient
        self.loss = ChunkedLoss(job.objective, accuracy=True)
        self.settings, self.specials, self.starts = job.objective.masking, specials, starts
        self.isolate = job.data.documents == "isolate"
        self.level = math.log(inputs.vocab)

    @property
    def head_weight(self) -> Tensor:
        """[V, width]"""
        if self.head.weight is not None:
            return self.head.weight
        table = self.model.embed.tokens.weight
        return table if self.head.extra is None else torch.cat((table, self.head.extra), 1)

    def through(
        self,
        tower: int,
        batch: Batch,
        noise: Noise | None = None,
        before: Tensor | None = None,
        embedded: Tensor | None = None,
        columns: Mapping[str, Columns] = ALL,
    ) -> Hidden:
        """Of a batch: `tokens`, `labels` int64 [B, S]; `documents`, `segments` [B, S] and `pair` [B] where they are
        needed."""
        documents, segments = batch.get("documents"), batch.get("segments")
        hidden: Hidden = self.model(
            batch["tokens"], documents, segments, noise, embedded, columns.get("tokens"), batch
        )
        return hidden

    def score(self, batch: Batch, hidden: Hidden, noise: Noise | None = None) -> LossOutput:
        """Only tokens that are predicted go through the head."""
        labels_BS = batch["labels"]
        chosen = labels_BS != IGNORE
        losses = self.loss(
            self.head(hidden.final[chosen]),
            self.head_weight,
            labels_BS[chosen],
            self.head.bias,
            self.taught_words(batch, chosen),
        )
        terms, metrics = self.word_terms(losses, batch, noise, chosen.sum())
        each_BS = torch.zeros_like(labels_BS, dtype=losses.each.dtype).masked_scatter(chosen, losses.each)
        self.add_choices(terms, metrics, hidden.sides, each_BS, chosen, choices.here, choices.whole)
        if self.pair is not None:
            pairs, metrics["pair_accuracy"] = self._pairs(hidden, batch["pair"])
            terms["pairs"] = self.task_weight(noise) * pairs
        return self.output(terms, metrics, batch, hidden, noise)

    def read(self, final: Tensor) -> Tensor:
        read: Tensor = self.head(final)
        return read

    @property
    def head_bias(self) -> Tensor:
        return self.head.bias

    def _pairs(self, hidden: Hidden, labels_B: Tensor) -> tuple[Tensor, Mean]:
        assert self.pair is not None
        logits = self.pair(hidden.final[:, 0] if hidden.pooled is None else hidden.pooled)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = F.cross_entropy(logits, labels_B, ignore_index=IGNORE, reduction="sum")
        return total, Mean((logits.argmax(1) == labels_B).sum(), valid(labels_B))

    def logits(
        self, tokens_BS: Tensor, documents_BS: Tensor | None = None, segments_BS: Tensor | None = None
    ) -> Tensor:
        """Logits of every place, [B, S, V]."""
        final = self.model(tokens_BS, documents_BS, segments_BS).final
        return F.linear(narrowed(self.head(final)), self.head_weight, self.head.bias)

    def attention_maps(self, batch: Batch) -> Tensor:
        return attention_maps(self.model, batch["tokens"], batch.get("documents"), batch.get("segments"))

    def collate(self, rows: Rows) -> Batch:
        """A batch from rows of `TokenRows` (the row between [CLS] and [SEP]) or of `SegmentPairs`."""
        assert self.specials is not None
        padded = "segments" in rows  # segment pairs; rows of a flat stream are full
        if not padded:
            rows = framed(rows, self.specials)
        starts = None if self.starts is None else self.starts[rows["tokens"]]
        maskable = rows["maskable"]
        inputs, labels = mask_tokens(
            rows["tokens"], rows["key"], self.settings, self.specials, maskable, starts
        )
        real = real_rows(rows)
        batch = passed(rows) | {"tokens": torch.from_numpy(inputs)}
        batch["labels"] = torch.from_numpy(labels).masked_fill_(~real[:, None], IGNORE)
        if self.pair is not None:
            batch["pair"] = torch.from_numpy(rows["label"]).masked_fill(~real, IGNORE)
        if self.model.embed.segments is not None:
            batch["segments"] = torch.from_numpy(rows["segments"])
        if self.isolate or padded:
            batch["documents"] = torch.from_numpy(rows["documents"])
        return batch

    def counts(self, batch: Batch) -> dict[str, int]:
        tokens = batch["tokens"]
        counts = {"tokens": int(valid(batch["labels"])), "rows": len(tokens), "read": tokens.numel()}
        counts = counts if self.pair is None else counts | {"pairs": int(valid(batch["pair"]))}
        return self.with_counts(batch, counts)


def framed(rows: Rows, specials: Specials) -> Rows:
    """Rows of a flat stream, S - 2 tokens each, between [CLS] and [SEP]; what is packed into a row is one segment."""
    inner = rows["tokens"][:, :-1]  # the last token begins the next row
    tokens = np.pad(inner, ((0, 0), (1, 1)))
    tokens[:, 0], tokens[:, -1] = specials.ids["cls"], specials.ids["sep"]
    documents = np.pad(rows["documents"][:, :-1], ((0, 0), (1, 1)), mode="edge")
    maskable = np.ones(tokens.shape, dtype=bool)
    maskable[:, [0, -1]] = False
    maskable &= tokens != specials.separator
    return rows | {
        "tokens": tokens,
        "documents": documents,
        "segments": np.zeros_like(tokens),
        "maskable": maskable,
    }
