"""Fixtures of the tests that need several ranks."""

from collections.abc import Iterator

import pytest

from headway.tests.parallel.nursery import Nursery
from headway.tests.parallel.pool import Pool

ENGINES = Nursery(
    "headway.tests.parallel.pool",
    "headway.parallel.engines.deepspeed.engine",
    "headway.parallel.engines.megatron.engine",
)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """Ranks of this module's own: DeepSpeed and Megatron-Core make many process groups, and each of gloo's has threads
    that wake a hundred times a second until the process ends."""
    ranks = Pool(nursery=ENGINES)
    yield ranks
    ranks.close()
