"""Causal language modelling: every token is predicted from those before it.

Shapes: B batch, S sequence, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from headway.kernels.cross_entropy import IGNORE, linear_cross_entropy, row_loss
from headway.pretrain import config
from headway.pretrain.engine import Batch
from headway.pretrain.models.gpt import GPT, attention_maps
from headway.pretrain.models.layers import Linear, Noise, narrowed


class LossOutput(NamedTuple):
    """Sums over a batch; engines add them up over micro-batches and ranks, then divide.

    Attributes:
        total: 0-dim, nats: what is differentiated, summed over valid tokens.
        tokens: 0-dim int64: valid tokens.
        metrics: more sums over valid tokens, without gradient.
    """

    total: Tensor
    tokens: Tensor
    metrics: dict[str, Tensor]


class ChunkedLoss(nn.Module):
    """Head and cross-entropy in chunks of rows.

    `compile()` compiles the work on one chunk's logits; the loop over chunks stays in Python, so compiling
    takes as long for a large batch as for a small one.
    """

    def __init__(self, z_loss: float, chunk: int | None) -> None:
        super().__init__()
        self.z_loss, self.chunk = z_loss, chunk
        self.compute = row_loss

    def compile(self, *args: Any, **kwargs: Any) -> None:
        self.compute = torch.compile(row_loss, *args, **kwargs)

    def forward(self, hidden_BSE: Tensor, weight_VE: Tensor, labels_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss and the part of it that is z-loss; see `linear_cross_entropy`."""
        rows, labels = hidden_BSE.flatten(0, 1), labels_BS.flatten()
        return linear_cross_entropy(rows, weight_VE, labels, self.z_loss, self.chunk, self.compute)


class CausalLM(nn.Module):
    """A GPT with a head, and the loss of next tokens.

    A tied head owns no weight: it reads `model.embed.tokens.weight`. An untied one owns `head.weight`.
    """

    def __init__(
        self, model: GPT, vocab: int, tied: bool, objective: config.Objective, isolate: bool = False
    ) -> None:
        """
        Args:
            model: returns hidden states.
            vocab: rows of the head.
            tied: whether the head shares the token table.
            objective: weight of the z-loss, rows of a chunk.
            isolate: whether tokens see their own document only.
        """
        super().__init__()
        self.model = model
        self.head = None if tied else Linear(model.embed.tokens.embedding_dim, vocab, bias=False)
        self.loss = ChunkedLoss(objective.z_loss, objective.chunk)
        self.isolate = isolate

    @property
    def head_weight(self) -> Tensor:
        """[V, E]"""
        return self.model.embed.tokens.weight if self.head is None else self.head.weight

    def forward(self, batch: Batch, noise: Noise | None = None) -> LossOutput:
        """
        Args:
            batch: `tokens` and `labels` int64 [B, S] (IGNORE where not scored); `documents` [B, S] and
                `positions` [S] (the columns' places in the sequence) where they are needed.
            noise: what dropout depends on; None drops nothing.
        """
        labels_BS = batch["labels"]
        hidden = self.model(batch["tokens"], batch.get("documents"), batch.get("positions"), noise)
        total, z = self.loss(hidden.final, self.head_weight, labels_BS)
        metrics = {"z_loss": z} if self.loss.z_loss else {}
        return LossOutput(total, (labels_BS != IGNORE).sum(), metrics)

    def logits(self, tokens_BS: Tensor, at: int | None = None) -> Tensor:
        """Logits in the dtype of matrix products, [B, S, V], or [B, V] after the token at place `at` alone."""
        final = narrowed(self.model(tokens_BS).final)
        return nn.functional.linear(final if at is None else final[:, at], self.head_weight)

    def attention_maps(self, tokens_BS: Tensor) -> Tensor:
        """Attention weights of every layer and head, [layers, B, H, S, S]."""
        return attention_maps(self.model, tokens_BS)

    def collate(self, rows: Mapping[str, np.ndarray]) -> Batch:
        """A batch from rows of samples.

        Args:
            rows: `tokens` int64 [n, S + 1], `documents` int32 [n, S + 1], `scored` bool [n, S] if not every
                label counts; integers of shape [n], such as `sample` and `slot`, pass through.
        """
        tokens, scored = torch.from_numpy(rows["tokens"]), rows.get("scored")
        labels = tokens[:, 1:].clone()
        if scored is not None:
            labels.masked_fill_(~torch.from_numpy(scored), IGNORE)
        batch = {k: torch.from_numpy(v) for k, v in rows.items() if v.ndim == 1}
        batch |= {"tokens": tokens[:, :-1].contiguous(), "labels": labels}
        if self.isolate:
            batch["documents"] = torch.from_numpy(rows["documents"])[:, :-1].contiguous()
        return batch

    def valid_tokens(self, batch: Batch) -> int:
        """Labels that are scored."""
        return int((batch["labels"] != IGNORE).sum())
