"""One curve along pipelines: every family and schedule against one process, in fp64, all that is random on."""

import pytest

from headway.tests.parallel.family_cases import CASES
from headway.tests.parallel.test_families import compare, curves


@pytest.mark.parametrize("name", list(CASES))
def test_every_family_draws_the_curve_of_one_process(pool, name):
    alone = curves(0, 1, {}, [name])
    for found in pool(curves, ranks=2, parallel={"pipeline": 2}, names=[name]):
        compare(name, found[name], alone[name])
