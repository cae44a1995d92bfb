"""Distillation at every layout against one process, in fp64: student and teacher spread alike, and each in its own
way."""

import pytest

from headway.tests.parallel.distill_cases import STUDENTS
from headway.tests.parallel.proof import prove

NAMES = sorted(STUDENTS)
ALIKE = [
    ({"micro_batch": 4}, NAMES),
    ({"shard": 2}, ["learning_gpt", "learning_t5"]),
    ({"replicate": 2, "shard": 1, "micro_batch": 3}, ["learning_bert", "learning_alibi"]),
    ({"tensor": 2}, NAMES),
    ({"context": 2}, NAMES),
    ({"pipeline": 2, "micro_batch": 4}, NAMES),
]


@pytest.mark.parametrize(("parallel", "names"), ALIKE)
def test_a_student_draws_the_curve_of_one_process(pool, parallel, names):
    prove(pool, names, parallel)
