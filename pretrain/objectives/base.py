"""What every objective is: head and loss around a model, and the shaping of rows into batches.

Shapes: B batch, S sequence, E hidden size, V vocabulary, X experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headway.kernels.cross_entropy import IGNORE, Losses, Options, linear_cross_entropy, row_loss
from headway.kernels.soft_targets import Soft, SoftRowLoss, Teacher, soft_row_loss
from headway.pretrain import config
from headway.pretrain.data.samples import Rows
from headway.pretrain.engine import Batch
from headway.pretrain.models.columns import Columns
from headway.pretrain.models.hidden import Hidden
from headway.pretrain.models.layers import Noise
from headway.pretrain.models.moe import MoE
from headway.pretrain.models.routing import Side
from headway.pretrain.models.spectral import SpectralLinear
from headway.pretrain.models.transformer import Stack
from headway.pretrain.objectives import choices
from headway.pretrain.objectives.choices import ReachOf
from headway.pretrain.objectives.distill.distillation import Distillation
from headway.pretrain.objectives.distill.match import LEARNED
from headway.pretrain.objectives.distill.names import taught
from headway.pretrain.optim.sharded import local, whole


class Mean(NamedTuple):
    """Sum of a metric and what it is divided by, without gradient; engines add up both. Sums may be vectors."""

    sum: Tensor
    over: Tensor


class LossOutput(NamedTuple):
    """Sums over a batch; engines add them up over micro-batches and ranks.

    Attributes:
        terms: name of a count (see `Objective.counts`) -> summed loss, 0-dim, in nats. The loss is the sum of each
            term over its count in the global batch; that is what is differentiated.
        metrics: what else is reported.
    """

    terms: dict[str, Tensor]
    metrics: dict[str, Mean]


ALL: Mapping[str, Columns] = {}
"""All columns of all sequences are here."""


class Objective(nn.Module):
    """Base of all objectives.

    Attributes:
        model: returns hidden states.
        scored: name of the count and term that held-out loss is about.
        towers: names of the model's towers, in order of computation.
        remembered: whether every block of a later tower reads what the tower before it gave, and not the first alone.
        weights: weight in the loss of what blocks give beside, by name.
        level: loss of a label where nothing is known, a constant of baselines (see `choices`).
        distillation: what it has beside when it learns from a teacher.
    """

    scored = "tokens"
    towers: tuple[str, ...] = ("model",)
    remembered = False
    level = 0.0

    def __init__(self, model: nn.Module, shape: config.Model) -> None:
        super().__init__()
        self.model = model
        self.distillation: Distillation | None = None
        self.weights = {
            "balance": shape.experts.balance,
            "router_z": shape.experts.z_loss,
            "attention_entropy": shape.attention.entropy_penalty,
            "attention_span": shape.attention.span_penalty,
        }

    def forward(
        self, batch: Batch, noise: Noise | None = None, columns: Mapping[str, Columns] = ALL
    ) -> LossOutput:
        """
        Args:
            batch: what `collate` made, or a slice of its rows.
            noise: what dropout depends on; None drops nothing.
            columns: of every sequence, by the name of the tensor that is read, which of its columns are here, where
                others are elsewhere. The batch then has these columns only of all its tensors along that sequence
                but `documents` (`target_documents`), which masks need whole.
        """
        hidden, sides = None, []
        for tower in range(len(self.towers)):
            before: Tensor | None = None if hidden is None else hidden.final
            hidden = self.through(tower, batch, noise, before, columns=columns)
            sides += hidden.sides
        assert hidden is not None
        return self.score(batch, hidden._replace(sides=sides), noise)

    def through(
        self,
        tower: int,
        batch: Batch,
        noise: Noise | None = None,
        before: Tensor | None = None,
        embedded: Tensor | None = None,
        columns: Mapping[str, Columns] = ALL,
    ) -> Hidden:
        """What one tower makes of a batch, from what the tower before it gave.

        Args:
            tower: its place among `towers`.
            batch: as in `forward`.
            noise: as in `forward`.
            before: `final` of the tower before.
            embedded: what goes into the first block (the columns that are here), where something else has computed it.
            columns: as in `forward`.
        """
        raise NotImplementedError

    def score(self, batch: Batch, hidden: Hidden, noise: Noise | None = None) -> LossOutput:
        """Heads and loss, from the last tower's hidden states with the sides of all towers."""
        raise NotImplementedError

    def read(self, final: Tensor) -> Tensor:
        """What the head multiplies, of last hidden states; of objectives that predict words."""
        return final

    @property
    def head_bias(self) -> Tensor | None:
        """[V], of objectives that predict words."""
        return None

    def taught_words(self, batch: Batch, chosen: Tensor | None = None) -> Teacher | None:
        """The teacher's soft targets, if the batch has some; of the chosen places alone, bool [B, S]."""
        return None if self.distillation is None else self.distillation.words(batch, chosen)

    def collate(self, rows: Rows) -> Batch:
        """A batch from rows of samples; `scored` bool [n] or [n, S], if it is there, says what counts."""
        raise NotImplementedError

    def counts(self, batch: Batch) -> dict[str, int]:
        """What the terms of the loss are divided by, and `read`: the tokens (patches) that the model reads."""
        raise NotImplementedError

    def attention_maps(self, batch: Batch) -> Tensor:
        """Attention weights of every layer and head, [layers, B, H, S, S]."""
        raise NotImplementedError

    def output(
        self,
        terms: dict[str, Tensor],
        metrics: dict[str, Mean],
        batch: Batch,
        hidden: Hidden,
        noise: Noise | None,
    ) -> LossOutput:
        """The output with the losses and statistics of routing and attention, means over rows and layers, and with what
        is learned from a teacher. Of the batch's rows statistics leave out those that are not `real`."""
        sides, real_B = hidden.sides, batch.get("real")
        named = [(i, name) for i, side in enumerate(sides) for name in side if not _of_others(name)]
        for name in dict.fromkeys(name for _, name in named):
            layers = [i for i, other in named if other == name]
            if name in self.weights:
                mean_B = torch.stack([sides[i][name] for i in layers]).mean(0)
                metrics[name] = _mean(mean_B, real_B)
                if self.weights[name]:
                    terms["rows"] = terms.get("rows", 0) + self.weights[name] * mean_B.sum()
                continue
            for i in layers:
                metrics[f"{name}/{i}"] = _mean(sides[i][name], real_B)
        if self.distillation is not None:
            learned: dict[str, Any] = {}
            self.distillation.add(terms, learned, batch, hidden, noise)
            metrics |= {name: Mean(*found) for name, found in learned.items()}
        return LossOutput(terms, metrics)

    def with_counts(self, batch: Batch, counts: dict[str, int]) -> dict[str, int]:
        """The counts with those of what is learned from a teacher."""
        return counts if self.distillation is None else counts | self.distillation.counts(batch)

    def word_terms(
        self, losses: Losses, batch: Batch, noise: Noise | None, count: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Mean]]:
        """Terms and metrics of a loss over words; of an evaluation, the objective's own loss without weights."""
        loss: ChunkedLoss = self.loss  # type: ignore[assignment]
        metrics = token_metrics(losses, loss.options, count)
        if self.distillation is None:
            return {"tokens": losses.total}, metrics
        if noise is None:
            return {"tokens": losses.task}, metrics | self._soft_metrics(losses, batch, count)
        total = losses.total if taught(batch) else self.task_weight(noise) * losses.total
        metrics["task_loss"] = Mean(losses.task, count)
        return {"tokens": total}, metrics | self._soft_metrics(losses, batch, count)

    def task_weight(self, noise: Noise | None) -> float:
        """Of the objective's own loss: with a teacher, in training, as `objective.distill.task` says."""
        return 1.0 if self.distillation is None or noise is None else self.distillation.settings.task

    def _soft_metrics(self, losses: Losses, batch: Batch, count: Tensor) -> dict[str, Mean]:
        return {"soft_loss": Mean(losses.soft, count)} if taught(batch) else {}

    def add_choices(
        self,
        terms: dict[str, Tensor],
        metrics: dict[str, Mean],
        sides: list[Side],
        loss_BS: Tensor,
        counts_BS: Tensor,
        last: ReachOf,
        others: ReachOf,
    ) -> None:
        """Add to the terms what choices learn by, where any were drawn.

        Args:
            loss_BS: of every place, without gradient, 0 where nothing is scored; `counts_BS` says where.
            last, others: how far choices of the last block reach, and those of the others; see `choices.learn`.
        """
        if not any(choices.SIDES[0] in side for side in sides):
            return
        reaches = last(loss_BS, counts_BS), others(loss_BS, counts_BS)
        found = choices.learn(sides, *reaches, self.level)
        metrics["baseline_error"] = _mean(found.foreseen, None)
        terms[self.scored] = terms[self.scored] + found.chosen
        error = found.foreseen.sum()
        terms["rows"] = terms.get("rows", 0) + error - error.detach()

    def after_update(self, metrics: Mapping[str, Tensor]) -> None:
        """What follows an optimizer step: experts are balanced, spectral norms are followed.

        Args:
            metrics: means over the global batch; `load/LAYER` is the load of the experts [X].
        """
        loads = [
            value for name, value in metrics.items() if name.startswith("load/")
        ]  # one for each use of a block
        for stack in (m for m in self.modules() if isinstance(m, Stack)):
            for moe in (block.mlp for block in stack if isinstance(block.mlp, MoE)):
                load_X, loads = torch.stack(loads[: stack.repeats]).sum(0), loads[stack.repeats :]
                moe.rebalance(load_X.to(moe.router.weight.device))
        self.iterate(1)
        if self.distillation is not None:
            self.distillation.after_update()

    def iterate(self, times: int) -> None:
        """Power iterations of spectral norms: one a step, some more before the first."""
        for module in self.modules():
            if isinstance(module, SpectralLinear):
                weight = dict(module.named_parameters())[
                    "weight"
                ].detach()  # the whole one, where it is spread
                module.iterate(whole(local(weight), weight), times)


class ChunkedLoss(nn.Module):
    """Head and cross-entropy in chunks of rows.

    `compile()` compiles the work on one chunk's logits; the loop over chunks stays in Python, so compiling
    takes as long for a large batch as for a small one.

    Attributes:
        soft: how a teacher counts, where rows come with one.
    """

    def __init__(self, objective: config.Objective, accuracy: bool = False) -> None:
        super().__init__()
        self.options = Options(objective.z_loss, objective.label_smoothing, accuracy)
        self.chunk = objective.chunk
        self.compute = row_loss
        self.soft: Soft | None = None
        self.compute_soft: SoftRowLoss = soft_row_loss

    def compile(self, *args: Any, **kwargs: Any) -> None:
        self.compute = torch.compile(self.compute, *args, **kwargs)
        self.compute_soft = torch.compile(self.compute_soft, *args, **kwargs)

    def forward(
        self,
        hidden: Tensor,
        weight_VE: Tensor,
        labels: Tensor,
        bias_V: Tensor | None = None,
        teacher: Teacher | None = None,
    ) -> Losses:
        """Sums over labels that are not IGNORE; hidden states [..., E] and labels [...] alike in shape, a teacher's
        with one dim for all of theirs."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        compute: Callable[..., Any] = self.compute
        how = self.options, self.chunk, compute, bias_V, self.soft, teacher, self.compute_soft
        return linear_cross_entropy(rows, weight_VE, labels.reshape(-1), *how)


def token_metrics(losses: Losses, options: Options, count: Tensor) -> dict[str, Mean]:
    """What a loss over tokens reports beside itself."""
    metrics = {}
    if options.z_loss:
        metrics["z_loss"] = Mean(losses.z, count)
    if options.accuracy:
        metrics["accuracy"] = Mean(losses.correct, count)
    return metrics


def valid(labels: Tensor) -> Tensor:
    """Number of labels that count, 0-dim."""
    return (labels != IGNORE).sum()


def real_rows(rows: Rows) -> Tensor:
    """Which rows count at all, bool [n]: fillers of an evaluation have nothing that is scored."""
    if "scored" not in rows:
        return torch.ones(len(next(iter(rows.values()))), dtype=torch.bool)
    scored = torch.from_numpy(rows["scored"])
    return scored if scored.dim() == 1 else scored.any(1)


def passed(rows: Rows) -> Batch:
    """What every batch keeps of its rows: `sample` and `slot`, integers of shape [n], and `real` (see `real_rows`) if
    some may not count."""
    kept: Batch = {name: torch.from_numpy(rows[name]) for name in ("sample", "slot") if name in rows}
    return kept | {"real": real_rows(rows)} if "scored" in rows else kept


def _of_others(name: str) -> bool:
    """Whether something else than `output` reads what a block gives beside."""
    return name in choices.SIDES or name.startswith(LEARNED)


def _mean(values: Tensor, real_B: Tensor | None) -> Mean:
    """Mean of numbers (or vectors) of rows."""
    values = values.detach()
    if real_B is None:
        return Mean(values.sum(0), torch.tensor(values.shape[0], device=values.device))
    return Mean(values[real_B].sum(0), real_B.sum())
