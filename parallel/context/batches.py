"""Batches cut along their sequences, and what becomes of a loss of which a rank computes its columns.

Shapes: B batch, S columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headway.parallel.context.exchange import Team
from headway.parallel.context.layout import places
from headway.pretrain.engine import Batch
from headway.pretrain.models.columns import Columns
from headway.pretrain.models.transformer import Stack
from headway.pretrain.objectives import LossOutput, Mean, Objective
from headway.pretrain.objectives.causal import CausalLM
from headway.pretrain.objectives.classify import Classifier
from headway.pretrain.objectives.distill.match import LEARNED
from headway.pretrain.objectives.mae import MaskedAutoencoder
from headway.pretrain.objectives.masked import MaskedLM
from headway.pretrain.objectives.seq2seq import Seq2SeqLM


@dataclass(frozen=True)
class Cut:
    """How an objective's batch is cut.

    Attributes:
        sequences: name of a sequence (that of the tensor which is read) -> names of tensors [B, S] that are cut along
            it. `documents` stay whole: masks describe whole sequences.
        own: terms and metrics that add up columns, so that a rank has its share of them. All others are about whole
            rows, and every rank computes them alike.
    """

    sequences: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    own: tuple[str, ...] = ()


WORDS = ("tokens", "accuracy", "z_loss", "task_loss", "soft_loss")
CUTS: dict[type[Objective], Cut] = {
    CausalLM: Cut({"tokens": ("tokens", "labels")}, WORDS),
    MaskedLM: Cut({"tokens": ("tokens", "labels", "segments")}, WORDS),
    Seq2SeqLM: Cut({"tokens": ("tokens",), "targets": ("targets", "labels")}, WORDS),
    Classifier: Cut(),
    MaskedAutoencoder: Cut(),
}
"""Images are cut after their embedding and gathered after the blocks: see `lengths`."""


def lengths(objective: Objective, batch: Batch, cut: Cut) -> dict[str, int]:
    """Columns of every sequence that the objective's blocks read."""
    if isinstance(objective, Classifier):
        return {"pixels": objective.places}
    if isinstance(objective, MaskedAutoencoder):
        first = objective.first
        return {"visible": first + objective.visible, "pixels": first + objective.patches}
    return {name: batch[name].shape[1] for name in cut.sequences}


class Slicer:
    """Hooks of an objective's forward: batch in, shares out. Stages of a pipeline call it themselves."""

    def __init__(self, team: Team, cut: Cut) -> None:
        self.team, self.cut = team, cut

    def before(self, objective: Objective, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """(batch, noise) of whole rows -> (batch, noise, columns)."""
        batch, noise = (*args, None)[:2]
        device = batch["slot"].device if "slot" in batch else next(iter(batch.values())).device
        columns = {
            name: Columns(places(total, self.team.ranks, self.team.rank, device), total)
            for name, total in lengths(objective, batch, self.cut).items()
        }
        return self.sliced(batch, columns), noise, columns

    def sliced(self, batch: Batch, columns: Mapping[str, Columns]) -> Batch:
        """The columns that are here, of the tensors that have them."""
        cut = {
            tensor: columns[name].cut(batch[tensor])
            for name, tensors in self.cut.sequences.items()
            for tensor in tensors
            if tensor in batch
        }
        return batch | cut

    def after(self, objective: Objective, args: tuple[Any, ...], out: LossOutput) -> LossOutput:
        """What the objective gives -> this rank's share of it."""
        return self.shared(out)

    def shared(self, out: LossOutput) -> LossOutput:
        """What all ranks compute alike is divided among them."""
        ranks = self.team.ranks
        terms = {name: t if self._own(name) else t / ranks for name, t in out.terms.items()}
        metrics = {
            name: mean if self._own(name) else Mean(mean.sum / ranks, mean.over / ranks)
            for name, mean in out.metrics.items()
        }
        return LossOutput(terms, metrics)

    def _own(self, name: str) -> bool:
        """Whether a term or metric adds up columns."""
        return name in self.cut.own or name.startswith(("places.", LEARNED))


def gather_columns(team: Team) -> Any:
    """A hook of a stack that gives what follows its last block all columns."""

    @torch.compiler.disable
    def hook(stack: Stack, args: tuple[Any, ...], out: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        split = args[1].mask.split
        ended = stack.span is None or stack.span[1] == stack.uses
        return (team.gather(out[0], split[0]), out[1]) if split and ended else out

    return hook
