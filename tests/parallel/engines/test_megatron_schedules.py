"""Megatron-Core's pipeline schedules over our stages: the native engine with them in place of torch's, against one
process, in fp64, all that is random on."""

import numpy as np
import pytest

from headway.tests.parallel.engines.megatron_ranks import groups
from headway.tests.parallel.proof import STEPS, Curve, Running, alone, compare, ranks_of

pytest.importorskip("megatron.core")


def curves(rank, world, parallel, names):
    """Name -> fields of the `Curve` of some steps."""
    virtual = parallel.get("virtual", 2 if "interleaved" in parallel.get("schedule", "") else 1)
    sizes = {"virtual_pipeline_model_parallel_size": virtual} if virtual > 1 else {}
    with groups(pipeline_model_parallel_size=parallel["pipeline"], **sizes):
        from headway.parallel.engines.megatron.schedules import MegatronPipeline

        found = {}
        for name in names:
            running = Running(name, rank, world, parallel)
            engine = running.engine
            engine.pipeline = MegatronPipeline(
                engine.pipeline.plan, engine.objective, engine.named, running.here, running.job.parallel.schedule,
                engine.rows, engine._autocast,
            )  # fmt: skip
            results = [running.step(step) for step in range(STEPS)]
            metrics = [{k: np.array(v) for k, v in r.metrics.items()} for r in results]
            found[name] = [r.loss for r in results], [r.grad_norm for r in results], metrics, running.parts()
        return found


def prove(pool, parallel, names):
    found = pool(curves, ranks=ranks_of(parallel), timeout=600, parallel=parallel, names=names)
    for name in names:
        for rank in found:
            compare(name, Curve(*rank[name]), alone(name))


CASES = [
    ({"pipeline": 2}, ["gpt", "t5", "experts"]),
    ({"pipeline": 2, "schedule": "interleaved_1f1b"}, ["experts", "t5"]),
    ({"pipeline": 2, "schedule": "interleaved_1f1b", "micro_batch": 4}, ["experts"]),
    ({"pipeline": 2, "schedule": "interleaved_1f1b", "virtual": 3, "micro_batch": 1}, ["content"]),
]


@pytest.mark.parametrize(("parallel", "names"), CASES)
def test_schedules_draw_the_curve_of_one_process(pool, parallel, names):
    """Tied tables, a block that two stages use, three micro-batches on two ranks, three stages a rank."""
    prove(pool, parallel, names)
