"""Megatron-Core's pipeline schedules over our stages: the native engine with them in place of torch's, against one
process, in fp64, all that is random on."""

import numpy as np
import pytest
import torch

from headway.parallel.apply import materialise, spread
from headway.parallel.pipeline.plan import make_plan
from headway.tests.parallel.engines.megatron_ranks import groups
from headway.tests.parallel.family_cases import build
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


# -- with Megatron's DDP, which shards gradients over two data ranks -----------------------------------------------


def batch_of(running, rank, ranks):
    """A rank's rows of the first global batch."""
    stream, objective = running.stream, running.objective
    rows = stream.batch(0, running.sizes.rows(0), rank, ranks)
    return objective.collate(rows) | {"key": torch.from_numpy(rows["key"])}


def gradients_alone(name):
    """Gradients of one process in the first step."""
    running, found = Running(name, 0, 1, {}), {}
    running.engine.train_step(
        batch_of(running, 0, 1), 0, lambda named: found.update((n, g.clone()) for n, g in named.items())
    )
    return found


def sharded(rank, world, name, overlap):
    """Name -> (gradient, which of its elements are this rank's) after two steps of the same batch."""
    with groups(pipeline_model_parallel_size=2, get_embedding_ranks=lambda ranks: ranks[:1]):
        from megatron.core import distributed as megatron

        from headway.parallel.engines.megatron.guards import exact
        from headway.parallel.engines.megatron.schedules import Gradients, MegatronPipeline

        running = Running(name, rank, world, {"pipeline": 2, "shard": 2})
        job, here = running.job, running.here
        objective = build(job)[0]
        plan = make_plan(objective, job, here.layout)
        spread(objective, job, here, precision="fp64", plan=plan, plain=True)
        materialise(objective, job, here)
        named = dict(objective.named_parameters())
        for copied in (name for name in named if len(plan.holders[name]) > 1):
            named[copied].shared_embedding = True
        settings = megatron.DistributedDataParallelConfig(
            use_distributed_optimizer=True, overlap_grad_reduce=overlap, bucket_size=500
        )
        config = exact(
            num_layers=1, hidden_size=1, num_attention_heads=1, pipeline_model_parallel_size=2,
            pipeline_dtype=torch.float64,
        )  # fmt: skip
        data = megatron.DistributedDataParallel(config, settings, objective)
        gradients = Gradients(
            lambda p: p.main_grad, data.no_sync, lambda: megatron.finalize_model_grads([data], None)
        )
        pipeline = MegatronPipeline(
            plan, objective, named, here, "1f1b", running.engine.rows, running.engine._autocast, gradients
        )
        batch = batch_of(running, here.data_rank, 2)
        counts = running.engine._global_counts(batch)
        for _ in range(2):  # collectives overlap from the second on
            data.zero_grad_buffer()
            pipeline.train(pipeline.cut(batch), job.train.seed, 0, counts, 1.0)
        return {
            n: (named[n].main_grad.numpy(), shard.view_as(named[n]).numpy()) for n, shard in shards(data).items()
        }


def shards(data):
    """Of each parameter, which elements of its gradient this rank reduces."""
    names, found = {p: n for n, p in data.module.named_parameters()}, {}
    for buffer in data.buffers:
        mine = torch.zeros(buffer.numel, dtype=torch.bool)
        for bucket in buffer.buckets:
            size = bucket.grad_data.numel() // 2
            mine[bucket.offset + data.dp_group.rank() * size :][:size] = True
        # Not by the buckets' `param_to_index`, which forgets what is left free between parameters.
        for parameter, (start, stop, _) in buffer.param_index_map.items():
            found[names[parameter]] = mine[start:stop]
    return found


@pytest.mark.parametrize(
    ("name", "overlap"), [("t5", True), pytest.param("experts", False, marks=pytest.mark.matrix)]
)
def test_shards_of_gradients_are_those_of_one_process(pool, name, overlap):
    """A tied table and blocks that two stages use have buckets of their own, and copies are added shard by shard."""
    expected = gradients_alone(name)
    seen = {n: np.zeros(g.shape, dtype=bool) for n, g in expected.items()}
    for rank in pool(sharded, ranks=4, timeout=600, name=name, overlap=overlap):
        for n, (gradient, mine) in rank.items():
            seen[n] |= mine
            np.testing.assert_allclose(
                gradient[mine], expected[n].numpy()[mine], rtol=1e-8, atol=1e-12, err_msg=n
            )
    assert all(elements.all() for elements in seen.values())
