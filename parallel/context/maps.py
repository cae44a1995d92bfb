"""Comparison of attention maps where each rank has some columns: the keys of both models go round the ring.

Rows stay where they are. Once round, log-sum-exps of both models are merged; the second time, each row's loss and
centre; the third time, in the backward, gradients of the student's keys travel beside the keys and go home at the
end. See `headway.kernels.map_distillation` for the sums and `headway.parallel.context.ring` for the way.

Shapes: B batch, H student heads, G H teacher heads, S rows here, M keys here, T keys of the whole, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from headway.kernels.attention.dense import per_query_head
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.slopes import Distances, Slopes, learned, part_of
from headway.kernels.maps.divergences import DIVERGENCES
from headway.kernels.maps.gradients import Wanted
from headway.kernels.maps.operands import Scores, Seen
from headway.kernels.maps.parts import log_sums, part_gradients, part_terms, seen_keys
from headway.kernels.precision import product_dtype
from headway.parallel.context.exchange import Team
from headway.parallel.context.ring import Homeward, Part, Task, travel
from headway.pretrain.models.attention import Shown
from headway.pretrain.objectives.distill.match import compare_maps
from headway.pretrain.objectives.distill.rows import row_contrast


def compare(
    team: Team, shown: Shown, q_BSHD: Tensor, k_BMHD: Tensor, bias_HR: Tensor | None, loss: str
) -> Tensor:
    """As `compare_maps`: this rank's rows' share of the sum, [B]."""
    if shown.mask.split is None:
        return compare_maps(shown, q_BSHD, k_BMHD, bias_HR, loss)
    return _compare(team, shown, q_BSHD, k_BMHD, bias_HR, loss)


@torch.compiler.disable
def _compare(team: Team, shown: Shown, q: Tensor, k: Tensor, bias_HR: Tensor | None, loss: str) -> Tensor:
    assert shown.mask.split is not None
    dtype = product_dtype(shown.q_BHSD)
    bias = None if bias_HR is None else _here(bias_HR, team, shown.mask.split[0])
    teacher = Scores(q.to(dtype), per_query_head(k, q).to(dtype), q.shape[-1] ** -0.5, bias)
    student = Scores(shown.q_BHSD.to(dtype), shown.k_BKMD.to(dtype), shown.scale, shown.bias_HSM)
    task = Task(team, shown.mask, None, 1.0)
    own = learned(shown.bias_HSM)
    with torch.autocast(q.device.type, enabled=False):
        out: Tensor = _Compare.apply(student.q, student.k, own, teacher, student, loss, task)
    return out


def contrast(
    team: Team,
    shown: Shown,
    q_BHSD: Tensor,
    k_BHSD: Tensor,
    bias_HR: Tensor | None,
    count: int,
    temperature: float,
) -> Tensor:
    """As `row_contrast`, of all columns, which every rank gathers: this rank's share of the sum, [B]."""
    if shown.mask.split is None:
        return row_contrast(shown, q_BHSD, k_BHSD, bias_HR, count, temperature)
    asking, asked = shown.mask.split

    def whole(x_BHSD: Tensor, total: int) -> Tensor:
        return team.gather(x_BHSD.transpose(1, 2).contiguous(), total).transpose(1, 2)

    bias = shown.bias_HSM
    if isinstance(bias, Slopes):
        bias = bias._replace(queries=bias.keys)
    elif bias is not None:
        bias = team.gather(bias.transpose(0, 1).unsqueeze(0).contiguous(), asking)[0].transpose(0, 1)
    all_shown = Shown(
        whole(shown.q_BHSD, asking),
        whole(shown.k_BKMD, asked),
        shown.v_BKMD,
        shown.mask._replace(split=None),
        shown.scale,
        bias,
    )
    theirs = whole(q_BHSD, asking), whole(k_BHSD, asked)
    return row_contrast(all_shown, *theirs, bias_HR, count, temperature) / team.ranks


def _here(bias_HR: Tensor, team: Team, total: int) -> Distances:
    """A teacher's bias of the rows that are here and all keys."""
    numbers = [place for run in team.runs(total) for place in run]
    queries = torch.tensor(numbers, device=bias_HR.device)
    return Distances.whole(bias_HR, total)._replace(queries=queries)


class Keys(NamedTuple):
    """Keys of both models as one tensor that travels, [1, B, 1, M, features], and what it is made of."""

    heads: tuple[int, int]
    widths: tuple[int, int]

    @classmethod
    def of(cls, teacher: Scores, student: Scores) -> Keys:
        pair = teacher.k, student.k
        return cls((pair[0].shape[1], pair[1].shape[1]), (pair[0].shape[3], pair[1].shape[3]))

    def packed(self, teacher: Scores, student: Scores) -> Tensor:
        flat = [x.detach().transpose(1, 2).flatten(2) for x in (teacher.k, student.k)]
        return torch.cat(flat, -1)[None, :, None].contiguous()

    def unpacked(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        shapes = list(zip(self.heads, self.widths, strict=True))
        flat = packed[0, :, 0].split([h * d for h, d in shapes], -1)
        theirs, ours = (x.unflatten(-1, shape).transpose(1, 2) for x, shape in zip(flat, shapes, strict=True))
        return theirs, ours


def _parts(
    teacher: Scores, student: Scores, task: Task
) -> Iterator[tuple[int, int, Part, Scores, Scores, Seen]]:
    """(number of the stop, columns there, part, both models' scores of it, what is seen), as keys come by."""
    keys = Keys.of(teacher, student)
    for stop, (source, packed) in enumerate(travel(keys.packed(teacher, student), task)):
        theirs, ours = keys.unpacked(packed)
        for part in task.parts(source):
            pair = _some(teacher, theirs, part), _some(student, ours, part)
            yield stop, packed.shape[3], part, *pair, Seen(part.mask)


def _some(scores: Scores, k: Tensor, part: Part) -> Scores:
    """A model's scores of a part of rows and keys."""
    bias = scores.bias.detach() if isinstance(scores.bias, Tensor) else scores.bias
    some = None if bias is None else part_of(bias, part.queries, part.places)
    return Scores(scores.q[:, :, part.queries].detach(), k[:, :, part.keys], scores.scale, some)


def _counting(mask: Mask, task: Task, seen_BS: Tensor) -> Tensor:
    """Rows that count, bool [B, S]: they see a key, and are no padding."""
    counting = seen_BS > 0
    if mask.documents is None:
        return counting
    runs = task.team.runs(task.lengths()[0])
    return counting & (torch.cat([mask.documents[:, r.start : r.stop] for r in runs], 1) >= 0)


class _Compare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, bias, teacher, student, loss, task):
        wide = torch.promote_types(q.dtype, torch.float32)
        least, (batch, heads, length, _) = torch.finfo(wide).min, q.shape
        lse = [
            torch.full((batch, s.q.shape[1], length), least, dtype=wide, device=q.device)
            for s in (teacher, student)
        ]
        seen = torch.zeros(batch, 1, length, dtype=torch.int64, device=q.device)
        for _, _, part, theirs, ours, sees in _parts(teacher, student, task):
            here = part.queries
            for total, scores in zip(lse, (theirs, ours), strict=True):
                total[:, :, here] = torch.logaddexp(total[:, :, here], log_sums(scores, sees))
            seen[:, :, here] += seen_keys(ours, sees)
        value, centre = (torch.zeros(batch, heads, length, dtype=wide, device=q.device) for _ in range(2))
        for _, _, part, theirs, ours, sees in _parts(teacher, student, task):
            here = part.queries
            some, middle = part_terms(theirs, ours, loss, sees, *(x[:, :, here] for x in lse))
            value[:, :, here] += some
            centre[:, :, here] += middle
        weight = _counting(task.mask, task, seen[:, 0])[:, None].to(wide)
        if DIVERGENCES[loss].mean:
            weight = weight / seen.clamp(min=1)
        ctx.save_for_backward(q, k, bias, *lse, centre, weight)
        ctx.rest = teacher, student, loss, task
        return (value * weight).sum((1, 2)) / heads

    @staticmethod
    def backward(ctx, upstream_B):
        q, k, bias, lse_teacher, lse_student, centre, weight = ctx.saved_tensors
        teacher, student, loss, task = ctx.rest
        wide = lse_student.dtype
        upstream = (upstream_B[:, None, None] * weight / q.shape[1]).expand(q.shape[:3])
        dq = torch.zeros(q.shape, dtype=wide, device=q.device)
        d_bias = torch.zeros_like(bias, dtype=wide) if ctx.needs_input_grad[2] else None
        homeward, d_k, at = Homeward(task, wide), None, -1
        wanted = Wanted(True, True, d_bias is not None)
        for stop, columns, part, theirs, ours, sees in _parts(teacher, student, task):
            if stop != at:
                if d_k is not None:
                    homeward.add(d_k)
                d_k = torch.zeros(1, *k.shape[:2], columns, k.shape[3], dtype=wide, device=q.device)
                at = stop
            here = part.queries
            rows = [x[:, :, here] for x in (lse_teacher, lse_student, centre, upstream)]
            found = part_gradients(theirs, ours, loss, sees, rows[0], rows[1], rows[2], rows[3], wanted)
            some_q, some_k, some_bias = found
            assert some_q is not None
            assert some_k is not None
            assert d_k is not None
            dq[:, :, here] += some_q
            d_k[0, :, :, part.keys] += some_k
            if d_bias is not None and some_bias is not None:
                d_bias[:, here, part.places] += some_bias
        assert d_k is not None  # every rank stops at its own keys
        d_k = homeward.add(d_k)
        given = None if d_bias is None else d_bias.to(bias.dtype)
        return dq.to(q.dtype), d_k[0].to(k.dtype), given, *[None] * 4
