"""The part of the loss by which choices learn (`reinforce` attention). Its value is 0; its gradient, by the scores that
choices were drawn from, is an unbiased estimate of that of the expected loss.

A choice a at a place has the gradient (loss - baseline) grad log p(a) (Williams 1992). The loss is what the choice can
change, and no more: of a causal model that of its place and those after it; after the last block, where no place reads
another, that of its place alone. What is left out does not depend on the choice, and only its noise goes.

The baseline is labels (level + w.x + b): the labels that the loss is about, a constant level, and what a layer foresees
of their mean from its input x. A layer draws given x, every head and place by numbers of its own, so the baseline does
not depend on what is drawn there: as E[grad log p] = 0, it changes the variance and not the mean, whatever it is. It
learns by squared error, beside. Its state are parameters, and it reads its own row alone, so no layout changes it.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headway.pretrain.models.routing import Side

SIDES = ("log_chosen", "baseline")
"""What blocks give beside of choices: log-probabilities and what was foreseen, [B, S]."""


class Reach(NamedTuple):
    """What a choice at each place can change: summed loss, and the number of labels that it is about, both [B, S], or
    [B, 1] where they are the same for all places."""

    loss: Tensor
    labels: Tensor


ReachOf = Callable[[Tensor, Tensor], Reach]
"""(loss [B, S], what is scored bool [B, S]) -> how far choices reach."""


class Learning(NamedTuple):
    """What choices add to a loss.

    Attributes:
        chosen: 0-dim, in the unit of the loss that choices are to lower; its value is 0.
        foreseen: [B], squared error of baselines, a mean over places and layers; the loss of their parameters alone.
    """

    chosen: Tensor
    foreseen: Tensor


def whole(loss_BS: Tensor, scored_BS: Tensor) -> Reach:
    """Every choice can change the loss of the whole row."""
    return Reach(loss_BS.sum(1, keepdim=True), scored_BS.sum(1, keepdim=True).to(loss_BS.dtype))


def onward(loss_BS: Tensor, scored_BS: Tensor) -> Reach:
    """A choice can change the loss of its place and of those after it."""
    both = torch.stack((loss_BS, scored_BS.to(loss_BS.dtype)))
    return Reach(*both.flip(2).cumsum(2).flip(2))


def here(loss_BS: Tensor, scored_BS: Tensor) -> Reach:
    """A choice can change the loss of its place alone."""
    return Reach(loss_BS, scored_BS.to(loss_BS.dtype))


def learn(sides: Sequence[Side], last: Reach, others: Reach, level: float) -> Learning:
    """What the choices of all blocks add to the loss; there must be some.

    Args:
        sides: of all uses of blocks.
        last: what choices of the last of them can change, `others` those of the others; without gradient.
        level: of a baseline that foresees nothing, a label.
    """
    chosen, foreseen = [], []
    for use, side in enumerate(sides):
        if SIDES[0] not in side:
            continue
        loss, labels = last if use == len(sides) - 1 else others
        log_BS, guess_BS = (side[name] for name in SIDES)
        beyond = loss / labels.clamp(min=1) - level  # of a label
        advantage = labels * (beyond - guess_BS.detach())
        chosen.append((advantage * log_BS).sum())
        foreseen.append(torch.where(labels > 0, (beyond - guess_BS).square(), 0).mean(1))
    gain = torch.stack(chosen).sum()
    return Learning(gain - gain.detach(), torch.stack(foreseen).mean(0))
