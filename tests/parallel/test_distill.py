"""Distillation at every layout against one process, in fp64: student and teacher spread alike, each in its own way, and
on ranks of their own."""

import pytest

from headway.tests.chosen import first
from headway.tests.parallel.distill_cases import STUDENTS
from headway.tests.parallel.proof import prove

NAMES = sorted(STUDENTS)
GPT, ALIBI, BERT, T5, VIT = (f"learning_{name}" for name in ("gpt", "alibi", "bert", "t5", "vit"))
LAYOUTS = [
    ({"replicate": 2, "shard": 1, "micro_batch": 3}, [BERT]),
    ({"tensor": 2}, [GPT, VIT]),
    ({"context": 2}, [ALIBI, T5]),
    ({"pipeline": 2, "micro_batch": 4}, [BERT, T5]),
    ({"shard": 4, "teacher": {"tensor": 4}}, [GPT, VIT]),
    ({"shard": 2, "teacher": {"tensor": 2, "ranks": 2}}, [ALIBI]),
]
MATRIX = [
    {"micro_batch": 4},
    {"shard": 2},
    {"replicate": 2, "shard": 1, "micro_batch": 3},
    {"tensor": 2},
    {"tensor": 2, "sequence": False},
    {"context": 2},
    {"context": 2, "context_method": "ulysses"},
    {"pipeline": 2, "micro_batch": 4},
    {"tensor": 2, "pipeline": 2, "micro_batch": 6},
    {"tensor": 2, "context": 2, "teacher": {"tensor": 1, "context": 1}},
    {"context": 2, "teacher": {"tensor": 2, "context": 1}},
    {"shard": 2, "teacher": {"context": 2}},
    {"shard": 2, "replicate": 2, "teacher": {"tensor": 4}},
    {"pipeline": 2, "micro_batch": 4, "teacher": {"ranks": 2}},
    {"replicate": 2, "shard": 1, "teacher": {"ranks": 1}},
    {"tensor": 2, "shard": 1, "teacher": {"ranks": 2, "tensor": 1}},
]


@pytest.mark.parametrize(("parallel", "names"), first(3, LAYOUTS))
def test_a_student_draws_the_curve_of_one_process(pool, parallel, names):
    prove(pool, names, parallel)


@pytest.mark.matrix
@pytest.mark.parametrize("parallel", MATRIX, ids=str)
def test_a_student_draws_the_curve_of_one_process_at_every_layout(pool, parallel):
    prove(pool, NAMES, parallel)


@pytest.mark.long
@pytest.mark.parametrize("recompute", ["full", "attention", "products"])
def test_what_is_computed_again_teaches_the_same(pool, recompute):
    prove(pool, [GPT, T5], {"recompute": recompute, "shard": 2})
