"""The layout matrix: every pair and every three of axes, and every schedule, for every family, against one process.

Eight steps with AdamW, dropout and clipping on, tables tied, in fp64. Threes of axes, schedules, optimizers and narrow
precisions are tried on some of the families, in turns.
"""

from itertools import combinations

import pytest

from headway.parallel.mesh import AXES
from headway.parallel.pipeline.rules import SCHEDULES
from headway.tests.parallel.proof import prove

STEPS = 8
FAMILIES = ["gpt", "bert", "t5", "vit", "experts"]
PLAIN = {"model": {"heads": 4, "layers": 2, "unique_layers": None}, "optimizer": {"name": "adamw"}}
DEEP = {"model": {"heads": 4, "layers": 4}, "optimizer": {"name": "adamw"}}
"""Blocks for four stages."""

matrix = pytest.mark.matrix


def layout(*axes, **more):
    """Two ranks along each of some axes; a pipeline has at least two micro-batches."""
    rows = 12 // 2 ** len({"replicate", "shard"} & set(axes))
    micro = {"micro_batch": rows // 2} if "pipeline" in axes else {}
    return {"shard": 1} | dict.fromkeys(axes, 2) | micro | more


ULYSSES = {"context_method": "ulysses"}
PAIRS = {" x ".join(axes): layout(*axes) for axes in combinations(AXES, 2)} | {
    f"{axis} x ulysses": layout("context", axis, **ULYSSES) for axis in ("pipeline", "shard", "tensor")
}
SINGLES = {axis: layout(axis) for axis in AXES}
THREES = {" x ".join(axes): layout(*axes) for axes in combinations(AXES, 3)}
EXPERTS = {
    "expert x shard": layout("shard", expert=2),
    "expert x replicate": layout("shard", "replicate", expert=2),
    "expert x tensor": layout("tensor", expert=2),
    "expert x context": layout("context", expert=2),
    "expert x pipeline": layout("shard", "pipeline", expert=2),
    "expert x tensor x shard": layout("tensor", "shard", expert=4),
    "expert x context x shard": layout("context", "shard", expert=4),
    "expert x context x tensor": layout("context", "tensor", expert=2),
    "expert x tensor x pipeline x shard": layout("tensor", "pipeline", "shard", expert=2),
}
ALWAYS = [("pipeline x tensor", "experts"), ("context x tensor", "t5"), ("pipeline x context", "gpt")]
"""What `make test` runs."""


@pytest.mark.parametrize(("axes", "name"), ALWAYS)
def test_axes_together_draw_the_curve_of_one_process(pool, axes, name):
    prove(pool, [name], PAIRS[axes], PLAIN)


@matrix
@pytest.mark.parametrize("axes", PAIRS)
def test_every_pair_of_axes(pool, axes):
    names = ["gpt", "t5"] if "ulysses" in axes else FAMILIES
    prove(pool, names, PAIRS[axes], PLAIN, STEPS)


@matrix
@pytest.mark.parametrize(("turn", "axes"), enumerate(THREES))
def test_every_three_of_axes(pool, turn, axes):
    prove(pool, [FAMILIES[turn % 5]], THREES[axes], PLAIN, STEPS)


@pytest.mark.long
@pytest.mark.parametrize("axes", THREES)
def test_every_three_of_axes_for_every_family(pool, axes):
    prove(pool, FAMILIES, THREES[axes], PLAIN, STEPS)


@matrix
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule(pool, schedule):
    prove(pool, ["gpt", "t5", "experts"], layout("pipeline", schedule=schedule, micro_batch=3), DEEP, STEPS)


@matrix
@pytest.mark.parametrize(("turn", "axes"), enumerate(EXPERTS))
def test_experts_beside_other_axes(pool, turn, axes):
    prove(pool, [["experts", "roberta"][turn % 2]], EXPERTS[axes], PLAIN, STEPS)


@matrix
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(("optimizer", "name"), [("lamb", "bert"), ("muon", "gpt"), ("adafactor", "t5")])
def test_optimizers_that_need_whole_tensors(pool, optimizer, name, axis):
    more = {"model": PLAIN["model"], "optimizer": {"name": optimizer}}
    prove(pool, [name], SINGLES[axis], more, STEPS)


NARROW = SINGLES | {axes: PAIRS[axes] for axes in ("pipeline x tensor", "shard x context")}


@matrix
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("axes", NARROW)
def test_narrow_precisions_stay_near(pool, axes, precision):
    prove(pool, ["gpt"], NARROW[axes], PLAIN, STEPS, precision)


@matrix
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_experts_in_narrow_precisions_stay_near(pool, precision):
    prove(pool, ["roberta"], EXPERTS["expert x shard"], PLAIN, STEPS, precision)
