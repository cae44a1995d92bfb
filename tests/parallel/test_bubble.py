"""Idle share of torch's schedules with equal stage times, walked event by event, against the papers' formulas."""

from types import SimpleNamespace

import pytest
from torch import nn
from torch.distributed.pipelining import schedules

from headway.parallel.pipeline.bubble import idle_share
from headway.parallel.pipeline.plan import place_stages
from headway.parallel.pipeline.rules import SCHEDULES, legal
from headway.parallel.pipeline.run import TORCH

UNITS = {"F": 1, "I": 1, "W": 1, "B": 2}


def orders(schedule, ranks, micro_batches, virtual):
    """Rank -> groups of actions (stage, kind, micro-batch) in order; those of a group end together."""
    places = place_stages(ranks * virtual, ranks, SCHEDULES[schedule].v_shaped)
    stages = [
        SimpleNamespace(
            num_stages=ranks * virtual,
            group_size=ranks,
            group_rank=0,
            stage_index=i,
            is_last=False,
            submod=nn.Module(),
        )
        for i, place in enumerate(places)
        if place == 0
    ]
    kind = TORCH[schedule]
    if (
        schedule == "gpipe"
    ):  # torch states the orders of these two in code alone; its table of 1F1B lacks an action
        return {
            rank: [[(rank, what, i)] for what in "FB" for i in range(micro_batches)] for rank in range(ranks)
        }
    if schedule == "1f1b":
        return {rank: one_by_one(rank, ranks, micro_batches) for rank in range(ranks)}
    single = issubclass(kind, schedules.PipelineScheduleSingle)
    order = kind(stages[0] if single else stages, micro_batches, loss_fn=lambda x, _: x).pipeline_order
    found = {}
    for rank, actions in order.items():
        groups = [a.sub_actions or (a,) for a in actions if a and a.computation_type.value != "REDUCE_GRAD"]
        found[rank] = [
            [(a.stage_index, a.computation_type.value, a.microbatch_index) for a in group] for group in groups
        ]
    return found


def one_by_one(rank, ranks, micro_batches):
    """`Schedule1F1B._step_microbatches`: forwards to fill the pipeline, then a backward and a forward in turn."""
    first = min(micro_batches, ranks - rank)
    forwards, backwards = ([[(rank, what, i)] for i in range(micro_batches)] for what in "FB")
    turns = [a for pair in zip(backwards, forwards[first:], strict=False) for a in pair]
    return [*forwards[:first], *turns, *backwards[micro_batches - first :]]


def needs(action, last):
    """The actions that must be done before this one, any of each group."""
    stage, what, i = action
    if what == "F":
        return [[(stage - 1, "F", i)]] if stage else []
    if what == "W":
        return [[(stage, "I", i)]]
    if stage == last:
        return [[(stage, "F", i)]]
    return [[(stage, "F", i)], [(stage + 1, "B", i), (stage + 1, "I", i)]]


def idle(schedule, ranks, micro_batches, virtual):
    """Mean share of the step that ranks wait: each does its next action as soon as what it needs is done."""
    waiting = orders(schedule, ranks, micro_batches, virtual)
    work = sum(UNITS[what] for groups in waiting.values() for group in groups for _, what, _ in group)
    assert work == 3 * ranks * virtual * micro_batches  # every stage does every micro-batch once
    done, clock = {}, dict.fromkeys(waiting, 0)
    while any(waiting.values()):
        moved = False
        for rank, groups in waiting.items():
            while groups:
                wanted = [one for action in groups[0] for one in needs(action, ranks * virtual - 1)]
                ready = [[done[a] for a in either if a in done] for either in wanted]
                if not all(ready):
                    break
                group = groups.pop(0)
                clock[rank] = max([clock[rank], *map(min, ready)]) + sum(UNITS[what] for _, what, _ in group)
                done |= dict.fromkeys(group, clock[rank])
                moved = True
        assert moved, "the ranks wait for each other for ever"
    return 1 - work / (ranks * max(clock.values()))


CASES = [
    (schedule, ranks, count * ranks, virtual)
    for schedule, kind in SCHEDULES.items()
    for ranks in (2, 4, 8)
    for count in (1, 2, 4, 8)
    for virtual in ({2, 3} if kind.most > 2 else {kind.least})
    if legal(schedule, count * ranks, ranks) and (schedule != "zbv" or count > 1)
]


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_idle_share_is_that_of_the_formula(schedule):
    for _, ranks, count, virtual in (case for case in CASES if case[0] == schedule):
        found, expected = idle(schedule, ranks, count, virtual), idle_share(schedule, ranks, count, virtual)
        assert found == pytest.approx(expected, rel=0.1), (ranks, count, virtual)
