"""What an objective has beside model and head when it learns from a teacher.

The teacher's part of the loss stands in the terms `places.0`, `places.1` (sums over the places of each tower that
count) and in `rows`; soft targets are a part of the objective's own term, computed with its logits.

Shapes: B batch, S sequence, E hidden size, V vocabulary, N samples of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headway.kernels.soft_targets import FullTeacher, Soft, TopTeacher
from headway.pretrain.config import Job, Model
from headway.pretrain.engine import Batch
from headway.pretrain.models.hidden import Hidden
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.layers import Linear, Noise
from headway.pretrain.models.routing import Side
from headway.pretrain.models.taps import set_tap
from headway.pretrain.models.transformer import Stack
from headway.pretrain.objectives.distill import names
from headway.pretrain.objectives.distill.contrast import Contrastive
from headway.pretrain.objectives.distill.lessons import frozen_below, lessons, targets
from headway.pretrain.objectives.distill.match import LEARNED, RESTING, Match, places, resting
from headway.pretrain.objectives.distill.names import Target

PARTS = {"across": "attention", "inputs": "states"}
"""What is found -> the part of the loss whose weight it has, where they differ."""
DOCUMENTS = ("documents", "target_documents")
"""Of each tower, in a batch."""

Metrics = dict[str, Any]
"""Name -> (sum, count)."""


class Wanted(NamedTuple):
    """What a teacher is asked for.

    Attributes:
        targets: of its layers.
        final: hidden states as its head reads them, of all words' soft targets.
        last: hidden states as its model gives them.
        top: so many of its likeliest words.
        classes: its logits of classes.
        others: representations of the whole global batch.
    """

    targets: tuple[Target, ...] = ()
    final: bool = False
    last: bool = False
    top: int | None = None
    classes: bool = False
    others: bool = False


class Distillation(nn.Module):
    """Beside an objective: its parts of the loss, and what they read.

    Attributes:
        head: the teacher's, frozen, where soft targets are about all words: it is cut as the student's own is.
        project: of last hidden states, where widths differ.
        contrast: projections and queue.
        ranks: that share a sequence, where its columns are spread; then also
        total: sum over them of what each has of its columns;
        here: the columns that are here, of a tensor [B, S] of all;
        share: of what is computed of last hidden states, which of images are whole on every rank.
    """

    def __init__(self, job: Job, inputs: Inputs, teacher: Model, head: tuple[int, int, bool]) -> None:
        """
        Args:
            job: the student's.
            inputs: lengths of its rows.
            teacher: shape of the teacher.
            head: the teacher's: what it multiplies, words, whether it has a bias.
        """
        super().__init__()
        self.settings = settings = job.objective.distill
        self.blocks, self.lengths = job.model.layers, (inputs.length, inputs.target_length)
        self.lessons = lessons(settings, job.model, teacher)
        self.classes = job.objective.name == "classify"
        full = settings.logits.weight > 0 and settings.logits.top_k is None and not self.classes
        self.head = Linear(*head) if full else None
        if self.head is not None:
            self.head.requires_grad_(False)
        widths = job.model.hidden, teacher.hidden
        differ = settings.final.weight and job.model.hidden != teacher.hidden
        self.project = Linear(*widths) if differ else None
        self.contrast = Contrastive(settings.contrast, *widths) if settings.contrast.weight else None
        self.ranks, self.share = 1, 1.0
        self.total: Callable[[Tensor], Tensor] = _alone
        self.here: Callable[[Tensor], Tensor] = _alone

    def attach(self, objective: nn.Module, student: Model, teacher: Model) -> None:
        """Give the blocks that learn something their taps."""
        for tower, name in enumerate(objective.towers):  # type: ignore[arg-type]
            stack = objective.get_submodule(f"{name}.blocks")
            assert isinstance(stack, Stack)
            for lesson, block in zip(self.lessons[tower], stack, strict=True):
                if lesson.any:
                    set_tap(block, Match(lesson, self.settings, student, teacher))

    @property
    def reads_places(self) -> bool:
        """Whether all places of the last block count."""
        by_layer = any(lesson.any for tower in self.lessons for lesson in tower)
        return by_layer or bool(self.settings.final.weight or self.settings.contrast.weight)

    def soft(self) -> Soft:
        """Weights of soft targets and of the objective's own loss."""
        logits = self.settings.logits
        return Soft(logits.temperature, logits.divergence, logits.weight, self.settings.task)

    def wanted(self, step: int | None, layers: Mapping[int, set[int]] | None = None) -> Wanted:
        """What a step needs of the teacher; None: an evaluation, which has all parts but the contrast.

        Args:
            step: its number.
            layers: tower -> layers of the student that are here, of a pipeline; all if None.
        """
        s = self.settings
        here = [
            lesson
            for tower, blocks in enumerate(self.lessons)
            for lesson in blocks
            if layers is None or lesson.layer in layers.get(tower, ())
        ]
        found = dict.fromkeys(target for lesson in here for target in targets(s, lesson, step))
        words = s.logits.at(step) and not self.classes
        return Wanted(
            tuple(found),
            final=words and s.logits.top_k is None,
            last=s.final.at(step),
            top=s.logits.top_k if words else None,
            classes=s.logits.at(step) and self.classes,
            others=step is not None and s.contrast.at(step),
        )

    def frozen(self, name: str, step: int) -> bool:
        """Whether a parameter does not move at a step, by its name."""
        below = frozen_below(self.settings, self.blocks, step)
        if not below:
            return False
        path = name.split(".")
        if "embed" in path:
            return True
        return "blocks" in path and int(path[path.index("blocks") + 1]) < below

    # -- what places count ---------------------------------------------------------------------------------

    def documents(self, batch: Batch, tower: int) -> Tensor | None:
        """Documents of a tower's places [B, S], below 0 at padding; None where all count."""
        return batch.get(DOCUMENTS[tower])

    def counted(self, batch: Batch, tower: int) -> Tensor:
        """How many places of each row count, int64 [B]."""
        documents = self.documents(batch, tower)
        if documents is not None:
            return (documents >= 0).sum(1)
        some = next(iter(batch.values()))
        return torch.full((len(some),), self.lengths[tower], device=some.device)

    def counts(self, batch: Batch) -> dict[str, int]:
        """What the terms are divided by."""
        return {
            f"places.{tower}": int(self.counted(batch, tower).sum()) for tower in range(len(self.lessons))
        }

    # -- loss ----------------------------------------------------------------------------------------------

    def words(self, batch: Batch, chosen: Tensor | None = None) -> FullTeacher | TopTeacher | None:
        """The teacher's side of soft targets; of the chosen places alone, bool [B, S]."""

        def rows(name: str) -> Tensor:
            return batch[name].flatten(0, 1) if chosen is None else batch[name][chosen]

        if names.FINAL in batch:
            assert self.head is not None
            return FullTeacher(rows(names.FINAL), self.head.weight, self.head.bias)
        if names.WORDS in batch:
            return TopTeacher(rows(names.LOGITS), rows(names.WORDS), rows(names.REST))
        return None

    def add(
        self, terms: dict[str, Tensor], metrics: Metrics, batch: Batch, hidden: Hidden, noise: Noise | None
    ) -> None:
        """Add the teacher's parts to the terms of a loss, and tell each."""
        begin, last = 0, len(self.lessons) - 1
        for tower, blocks in enumerate(self.lessons):
            found = means(hidden.sides[begin : begin + len(blocks)])
            begin += len(blocks)
            if (rest := found.pop(RESTING, None)) is not None:
                terms["rows"] = terms.get("rows", 0) + rest.sum()
            if tower == last and names.LAST in batch:
                found["final"] = self._final(batch, hidden)
            for name, value_B in found.items():
                weight = getattr(self.settings, PARTS.get(name, name)).weight
                key = f"places.{tower}"
                terms[key] = terms.get(key, 0) + weight * value_B.sum()
                known = f"{LEARNED}{name}" + (f".{tower}" if last else "")
                metrics[known] = self._told(value_B, batch, tower)
        if self.contrast is not None and names.OTHERS in batch and noise is not None:
            loss_B = self._contrast(batch, hidden)
            terms["rows"] = terms.get("rows", 0) + self.settings.contrast.weight * loss_B.sum()
            metrics["contrast"] = loss_B.detach().sum(), torch.tensor(len(loss_B), device=loss_B.device)
        if (idle := self._idle(batch)) is not None:
            terms["rows"] = terms.get("rows", 0) + idle

    def _told(self, value_B: Tensor, batch: Batch, tower: int) -> tuple[Tensor, Tensor]:
        """Sum and count of a part of the loss, over rows that count."""
        value_B, count_B = value_B.detach(), self.counted(batch, tower)
        if "real" in batch:
            value_B, count_B = value_B[batch["real"]], count_B[batch["real"]]
        return value_B.sum(), count_B.sum() / self.ranks

    def _final(self, batch: Batch, hidden: Hidden) -> Tensor:
        y = hidden.final if self.project is None else self.project(hidden.final)
        return places("cosine", y, batch[names.LAST], self._documents_here(batch)) * self.share

    def _contrast(self, batch: Batch, hidden: Hidden) -> Tensor:
        assert self.contrast is not None
        x_BSE, documents_BS = hidden.final, self._documents_here(batch)
        if documents_BS is not None:
            x_BSE = torch.where(documents_BS[..., None] >= 0, x_BSE, 0)
        mean_BE = self.total(x_BSE.sum(1) / self.counted(batch, len(self.lessons) - 1)[:, None].clamp(min=1))
        loss_B: Tensor = self.contrast(mean_BE, batch[names.OTHERS][0], batch["slot"])
        return loss_B

    def _documents_here(self, batch: Batch) -> Tensor | None:
        documents = self.documents(batch, len(self.lessons) - 1)
        return None if documents is None else self.here(documents)

    def _idle(self, batch: Batch) -> Tensor | None:
        """0, for the parameters of parts that this step does not have; see `resting`."""
        idle: list[nn.Module] = []
        if self.project is not None and names.LAST not in batch:
            idle.append(self.project)
        if self.contrast is not None and names.OTHERS not in batch:
            idle += [self.contrast.project, self.contrast.project_teacher]
        return resting(*idle) if idle else None

    def after_update(self) -> None:
        """What follows an optimizer step."""
        if self.contrast is not None:
            self.contrast.remember()


def means(sides: list[Side]) -> dict[str, Tensor]:
    """Means over the blocks that have learned something, [B], by name."""
    found: dict[str, list[Tensor]] = {}
    for side in sides:
        for name, value_B in side.items():
            if name.startswith(LEARNED):
                found.setdefault(name.removeprefix(LEARNED), []).append(value_B)
    return {name: torch.stack(values).mean(0) for name, values in found.items()}


def _alone(x: Tensor) -> Tensor:
    return x
