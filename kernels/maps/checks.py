"""What map distillation is given: checked, and described as kernels take it.

Shapes: B batch, H query heads, K key/value heads (in [H, Q, K]: keys), Q queries, S keys, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.kernels.attention.masks import Mask
from headway.kernels.attention.slopes import Fixed
from headway.kernels.maps.divergences import DIVERGENCES
from headway.kernels.maps.operands import Scores, Seen


def check_operands(teacher: Scores, student: Scores, loss: str) -> None:
    """Refuse what does not fit.

    Raises:
        ValueError: it names the argument, its value and the rule.
    """
    if loss not in DIVERGENCES:
        raise ValueError(f"loss = {loss!r}: losses of maps are {', '.join(DIVERGENCES)}")
    for whose, scores in (("teacher", teacher), ("student", student)):
        _check_model(whose, scores)
    (batch, heads, queries, _), keys = student.q.shape, student.k.shape[2]
    theirs = teacher.q.shape[0], teacher.q.shape[2], teacher.k.shape[2]
    if theirs != (batch, queries, keys):
        ours = batch, queries, keys
        raise ValueError(
            f"q_teacher, k_teacher: batch, queries and keys are {theirs}, must be the student's, {ours}"
        )
    if teacher.q.shape[1] % heads:
        raise ValueError(
            f"q_teacher has {teacher.q.shape[1]} heads: they must be a multiple of the student's {heads}, whose maps "
            "are compared with means of theirs; else give a mapping of heads: index_select the teacher's heads"
        )


def _check_model(whose: str, scores: Scores) -> None:
    q, k = scores.q, scores.k
    if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        shapes = f"{list(q.shape)}, {list(k.shape)}"
        raise ValueError(f"q_{whose}, k_{whose} are {shapes}: they must be [B, H, Q, D] and [B, K, S, D]")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"k_{whose} has {k.shape[1]} heads: they must divide the {q.shape[1]} of q_{whose}")
    if q.dtype != k.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"q_{whose}, k_{whose} are {q.dtype}, {k.dtype}: they must be of one floating dtype")
    _check_bias(whose, scores.bias, (q.shape[1], q.shape[2], k.shape[2]))


def _check_bias(whose: str, bias: Fixed | None, wanted: tuple[int, ...]) -> None:
    if bias is None:
        return
    shape = bias.shape if isinstance(bias, Tensor) else (len(bias[0]), len(bias.queries), len(bias.keys))
    if tuple(shape) != wanted:
        raise ValueError(f"{whose}_bias is {list(shape)}: it must be [heads, Q, S] = {list(wanted)}")


def described(mask: Mask | Tensor | None, causal: bool, scores: Scores) -> Seen:
    """What is seen, of the mask that a caller gives; see `map_distillation.map_distillation_loss`.

    Raises:
        ValueError: the mask's shape or dtype does not fit, or a causal one's lengths.
    """
    (batch, _, queries, _), keys = scores.q.shape, scores.k.shape[2]
    seen = Seen(Mask(causal))
    if isinstance(mask, Tensor):
        if mask.dtype != torch.bool:
            raise ValueError(f"mask is {mask.dtype}: a tensor must be bool, true where a key is seen")
        if mask.dim() == 2:
            seen = Seen(_padding(mask, causal, (batch, queries, keys)))
        else:
            seen = Seen(Mask(causal), _pairs(mask, (batch, 1, queries, keys)))
    elif mask is not None:
        if mask.split is not None:
            raise ValueError("mask.split: distillation of maps needs all columns of the sequences here")
        seen = Seen(mask._replace(causal=mask.causal or causal))
    if seen.mask.causal and seen.mask.shift is None and queries != keys:
        raise ValueError(f"causal: {queries} queries and {keys} keys; they must be as many")
    return seen


def _padding(real: Tensor, causal: bool, wanted: tuple[int, int, int]) -> Mask:
    """The mask of what is no padding, bool [B, S]; rows of padding do not count."""
    batch, queries, keys = wanted
    if tuple(real.shape) != (batch, keys):
        raise ValueError(f"mask is {list(real.shape)}: a mask of padding must be [B, S] = {[batch, keys]}")
    documents = torch.where(real, 0, -1)
    if queries == keys:
        return Mask(causal, documents)
    return Mask(causal, documents.new_zeros(batch, queries), documents)


def _pairs(seen: Tensor, wanted: tuple[int, ...]) -> Tensor:
    fits = seen.dim() == 4 and all(a in (1, b) for a, b in zip(seen.shape, wanted, strict=True))
    if not fits:
        rule = f"it must be [B, S], or broadcastable to [B, 1, Q, S] = {list(wanted)}"
        raise ValueError(f"mask is {list(seen.shape)}: {rule}")
    return seen.expand(-1, 1, *wanted[2:])
