"""Encoder-decoder objectives: span corruption (Raffel et al. 2020), UL2's mixture of denoisers (Tay et al. 2022),
prefix LM, and plain pairs of texts. They differ in how rows become inputs and targets, and in nothing else.

Shapes: B batch, S encoder's sequence, T decoder's sequence, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from headway.kernels.cross_entropy import IGNORE
from headway.pretrain.config import Job
from headway.pretrain.data.corruption import denoisers, spans
from headway.pretrain.data.samples import Rows
from headway.pretrain.data.specials import Specials
from headway.pretrain.engine import Batch
from headway.pretrain.models.columns import Columns
from headway.pretrain.models.hidden import Hidden
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.layers import Linear, Noise, narrowed
from headway.pretrain.models.maps import attention_maps
from headway.pretrain.models.t5 import T5
from headway.pretrain.objectives.base import (
    ALL,
    ChunkedLoss,
    LossOutput,
    Objective,
    passed,
    real_rows,
    valid,
)


class Seq2SeqLM(Objective):
    """A T5 with a head, tied or not, and the loss of the decoder's next tokens."""

    model: T5
    towers = ("model.encoder", "model.decoder")
    remembered = True

    def __init__(self, job: Job, inputs: Inputs, specials: Specials | None = None) -> None:
        """
        Args:
            job: its model and objective are read.
            inputs: vocabulary, length of the encoder's row and of the decoder's.
            specials: ids of padding and sentinels.
        """
        shape = job.model
        super().__init__(T5(shape, inputs), shape)
        self.head = None if shape.tied else Linear(shape.hidden, inputs.vocab, bias=False)
        self.head_scale = shape.head_scale
        self.loss = ChunkedLoss(job.objective, accuracy=True)
        self.settings, self.specials = job.objective, specials
        self.lengths = inputs.length, inputs.target_length
        self.routed = shape.experts.count > 0

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
        """Of a batch: `tokens` int64 [B, S], `targets` (what the decoder reads) and `labels` int64 [B, T]; `documents`
        [B, S] and `target_documents` [B, T], -1 at padding, where rows are padded."""
        documents, read = batch.get("documents"), columns.get("tokens")
        if tower == 0:
            return Hidden(*self.model.encode(batch["tokens"], documents, noise, embedded, read, batch))
        assert before is not None
        asked = batch.get("target_documents"), noise, embedded, read, columns.get("targets"), batch
        return Hidden(*self.model.decode(before, batch["targets"], documents, *asked))

    def score(self, batch: Batch, hidden: Hidden, noise: Noise | None = None) -> LossOutput:
        labels_BT = batch["labels"]
        losses = self.loss(
            self.read(hidden.final), self.head_weight, labels_BT, teacher=self.taught_words(batch)
        )
        return self.output(*self.word_terms(losses, batch, noise, valid(labels_BT)), batch, hidden, noise)

    def read(self, final: Tensor) -> Tensor:
        return final if self.head_scale == 1 else final * self.head_scale

    def logits(self, tokens_BS: Tensor, targets_BT: Tensor, documents_BS: Tensor | None = None) -> Tensor:
        """Logits after every token that the decoder reads, [B, T, V]."""
        final = self.read(self.model(tokens_BS, targets_BT, documents_BS).final)
        return nn.functional.linear(narrowed(final), self.head_weight)

    def attention_maps(self, batch: Batch) -> Tensor:
        """Of the encoder."""
        return attention_maps(self.model, batch["tokens"], batch["targets"], batch.get("documents"))

    def collate(self, rows: Rows) -> Batch:
        """A batch from rows of `TokenRows` of raw text, or of `TextPairs`."""
        assert self.specials is not None
        arrays, lengths = self._inputs_and_targets(rows)
        inputs, targets = (torch.from_numpy(array) for array in arrays)
        pad = self.specials.ids["pad"]
        batch = passed(rows) | {"tokens": inputs}
        batch["targets"] = torch.nn.functional.pad(targets[:, :-1], (1, 0), value=pad)
        batch["labels"] = targets.clone()
        if lengths:
            read, asked = (
                torch.arange(tokens.shape[1]) < torch.from_numpy(length)[:, None]
                for tokens, length in zip((inputs, targets), lengths, strict=True)
            )
            batch["documents"] = read.int() - 1
            if self.routed:  # what follows a target changes nothing but the load of experts
                batch["target_documents"] = asked.int() - 1
            batch["labels"].masked_fill_(~asked, IGNORE)
        batch["labels"].masked_fill_(~real_rows(rows)[:, None], IGNORE)
        return batch

    def _inputs_and_targets(self, rows: Rows) -> tuple[Sequence[np.ndarray], Sequence[np.ndarray]]:
        """Inputs [n, S] and targets [n, T]; the lengths of both [n] where rows are padded."""
        name, specials = self.settings.name, self.specials
        assert specials is not None
        if name == "pairs":
            return (rows["inputs"], rows["targets"]), (rows["input_lengths"], rows["target_lengths"])
        raw, keys = rows["tokens"][:, :-1], rows["key"]  # the last token begins the next row
        if name == "spans":
            return spans.corrupt(raw, keys, self.settings.spans, specials), ()
        if name == "ul2":
            made = denoisers.corrupt(raw, keys, self.settings.denoisers, specials, *self.lengths)
        else:
            made = denoisers.split_prefix(raw, keys, specials, *self.lengths)
        return made[:2], made[2:]

    def counts(self, batch: Batch) -> dict[str, int]:
        read = batch["tokens"].numel() + batch["targets"].numel()
        counts = {"tokens": int(valid(batch["labels"])), "rows": len(batch["tokens"]), "read": read}
        return self.with_counts(batch, counts)
