"""A student's tap: it compares what its block computes with what the teacher gave.

Each part of the loss is a sum over the places of a row that count (those that are no padding), and a mean over heads or
features, so that sums add up over micro-batches, columns and ranks.

Shapes: B batch, S sequence, H heads, D their width, E hidden size, R distances.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.kernels.attention.masks import Mask
from headway.kernels.attention.slopes import Distances, Fixed
from headway.kernels.map_distillation import map_distillation_sums, relation_heads
from headway.pretrain.config import Model
from headway.pretrain.config.distill import Distill
from headway.pretrain.models.attention import Shown
from headway.pretrain.models.layers import Linear
from headway.pretrain.models.routing import Side
from headway.pretrain.models.taps import Tap, Taught
from headway.pretrain.objectives.distill.lessons import Lesson
from headway.pretrain.objectives.distill.names import Target
from headway.pretrain.objectives.distill.rows import row_contrast

LEARNED = "learned/"
"""How what a tap finds is called among what blocks give beside: this, and the part of the loss."""
RESTING = "resting"
"""See `resting`."""


class Match(Tap):
    """What a block of the student learns.

    Attributes:
        heads: relation heads that are here.
        maps: compares attention maps; where columns are spread, something that knows where they are takes its place.
        rows: contrasts rows of maps, likewise.
        here: the columns that are here, of a tensor [B, S] of all.
    """

    def __init__(self, lesson: Lesson, settings: Distill, student: Model, teacher: Model) -> None:
        super().__init__()
        self.lesson, self.settings = lesson, settings
        widths = student.hidden, teacher.hidden
        wanted = settings.states.projection == "always" or student.hidden != teacher.hidden
        self.project = Linear(*widths) if wanted and lesson.states is not None else None
        self.project_inputs = Linear(*widths) if wanted and lesson.inputs is not None else None
        self.heads = settings.relations.heads or student.heads
        self.maps: Callable[..., Tensor] = compare_maps
        self.rows: Callable[..., Tensor] = row_contrast
        self.here: Callable[[Tensor], Tensor] = _all

    def attention(self, shown: Shown, taught: Taught, across: bool = False) -> Side:
        side: Side = {}
        lesson, settings = self.lesson, self.settings
        layer = lesson.across if across else lesson.attention
        if (asked := self._maps_of(layer, taught, across)) is not None:
            side["across" if across else "attention"] = self.maps(shown, *asked, settings.attention.loss)
        if across:
            return _named(side)
        if lesson.relations is not None:
            found = [self._relation(shown, what, taught) for what in settings.relations.of]
            if values := [value for value in found if value is not None]:
                side["relations"] = torch.stack(values).mean(0)
        if (asked := self._maps_of(lesson.rows, taught, across)) is not None:
            side["rows"] = self.rows(shown, *asked, settings.rows.count, settings.rows.temperature)
        return _named(side)

    def states(self, before_BSE: Tensor, after_BSE: Tensor, mask: Mask, taught: Taught) -> Side:
        side: Side = {}
        documents = None if mask.documents is None else self.here(mask.documents)
        for name, x, layer, project in (
            ("states", after_BSE, self.lesson.states, self.project),
            ("inputs", before_BSE, self.lesson.inputs, self.project_inputs),
        ):
            if layer is None:
                continue
            target = taught.get(Target(self.lesson.tower, layer, name).name)  # type: ignore[arg-type]
            if target is not None:
                y = x if project is None else project(x)
                side[name] = places(self.settings.states.loss, y, target, documents)
            elif project is not None:
                side[RESTING] = side.get(RESTING, 0) + resting(project).expand(len(x))
        return _named(side)

    def _maps_of(self, layer: int | None, taught: Taught, across: bool) -> tuple[Tensor, Tensor, Any] | None:
        """The teacher's queries, keys [B, H, S, D] and bias of a layer, if it gave them."""
        if layer is None:
            return None
        name = Target(self.lesson.tower, layer, "q", across)
        if name.name not in taught or name._replace(what="k").name not in taught:
            return None
        q, k = (taught[x.name].transpose(1, 2) for x in (name, name._replace(what="k")))
        by_distance = taught.get(name._replace(what="bias").name)
        return q, k, None if by_distance is None else by_distance[0].T

    def _relation(self, shown: Shown, of: str, taught: Taught) -> Tensor | None:
        assert self.lesson.relations is not None
        theirs = taught.get(Target(self.lesson.tower, self.lesson.relations, of).name)  # type: ignore[arg-type]
        if theirs is None:
            return None
        ours = {"queries": shown.q_BHSD, "keys": shown.k_BKMD, "values": shown.v_BKMD}[of]
        theirs = relation_heads(theirs.transpose(1, 2), self.heads)
        return self.maps(
            relating(shown, ours, self.heads), theirs, theirs, None, self.settings.relations.loss
        )


def compare_maps(shown: Shown, q_BHSD: Tensor, k_BHMD: Tensor, bias_HR: Tensor | None, loss: str) -> Tensor:
    """Loss of the student's maps against those of the teacher's queries and keys: [B], a sum over rows that count."""
    given = bias_HR if bias_HR is None else Distances.whole(bias_HR, q_BHSD.shape[2])
    return sums(shown, q_BHSD, k_BHMD, given, loss)


@torch.compiler.disable
def sums(shown: Shown, q_BHSD: Tensor, k_BHMD: Tensor, bias: Fixed | None, loss: str) -> Tensor:
    """`map_distillation_sums` of what a student's attention shows."""
    return map_distillation_sums(
        q_BHSD.to(shown.q_BHSD.dtype), k_BHMD.to(shown.q_BHSD.dtype), shown.q_BHSD, shown.k_BKMD,
        loss=loss, mask=shown.mask, scale=shown.scale, teacher_scale=q_BHSD.shape[-1] ** -0.5,
        teacher_bias=bias, student_bias=shown.bias_HSM,
    ).loss_B  # fmt: skip


def resting(*modules: nn.Module) -> Tensor:
    """0, with a gradient of 0 for the parameters of parts of the loss that a step does not have: what reduces gradients
    waits for all of them."""
    children = [child for module in modules for child in module.modules()]
    return torch.stack([getattr(m, name).sum() * 0 for m in children for name in m._parameters]).sum()


def relating(shown: Shown, a_BHSD: Tensor, heads: int) -> Shown:
    """What attention would show whose queries and keys were both some features, cut into other heads."""
    a_BRSD = relation_heads(a_BHSD, heads)
    scale = a_BRSD.shape[-1] ** -0.5
    return shown._replace(q_BHSD=a_BRSD, k_BKMD=a_BRSD, scale=scale, bias_HSM=None)


def places(loss: str, y_BSE: Tensor, target_BSE: Tensor, documents_BS: Tensor | None) -> Tensor:
    """Losses of hidden states, summed over the places that count: [B]."""
    wide = torch.promote_types(y_BSE.dtype, torch.float32)
    y, t = y_BSE.to(wide), target_BSE.to(wide)
    if loss == "cosine":
        each_BS = 1 - F.cosine_similarity(y, t, dim=-1)
    else:
        if loss == "normalised":
            y, t = (F.layer_norm(x, x.shape[-1:]) for x in (y, t))
        each_BS = (y - t).square().mean(-1)
    if documents_BS is not None:
        each_BS = torch.where(documents_BS >= 0, each_BS, 0)
    return each_BS.sum(1)


def _named(side: Side) -> Side:
    return {LEARNED + name: value for name, value in side.items()}


def _all(x: Tensor) -> Tensor:
    return x
