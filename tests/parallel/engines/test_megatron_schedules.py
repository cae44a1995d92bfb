"""Megatron-Core's pipeline schedules over our stages: the native engine with them in place of torch's, against one
process, in fp64, all that is random on."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from headway.parallel.apply import materialise, spread
from headway.parallel.pipeline.plan import make_plan
from headway.tests.parallel.engines.megatron_ranks import groups
from headway.tests.parallel.family_cases import build
from headway.tests.parallel.proof import STEPS, Curve, Running, alone, compare, ranks_of

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")


def curves(rank, world, parallel, names, precision):
    """Name -> fields of the `Curve` of some steps; over data and context axes, the native engine's FSDP reduces."""
    virtual = parallel.get("virtual", 2 if "interleaved" in parallel.get("schedule", "") else 1)
    sizes = {"virtual_pipeline_model_parallel_size": virtual} if virtual > 1 else {}
    sizes["context_parallel_size"] = parallel.get("context", 1)
    with groups(pipeline_model_parallel_size=parallel["pipeline"], **sizes):
        from headway.parallel.engines.megatron.schedules import MegatronPipeline

        found = {}
        for name in names:
            running = Running(name, rank, world, parallel, precision=precision)
            engine = running.engine
            engine.pipeline = MegatronPipeline(
                engine.pipeline.plan, engine.objective, engine.named, running.here, running.job.parallel.schedule,
                engine.rows, engine._autocast,
            )  # fmt: skip
            results = [running.step(step) for step in range(STEPS)]
            metrics = [{k: np.array(v) for k, v in r.metrics.items()} for r in results]
            found[name] = [r.loss for r in results], [r.grad_norm for r in results], metrics, running.parts()
        return found


def prove(pool, parallel, names, precision="fp64"):
    settings = {"parallel": parallel, "names": names, "precision": precision}
    found = pool(curves, ranks=ranks_of(parallel), timeout=600, **settings)
    for name in names:
        for rank in found:
            compare(name, Curve(*rank[name]), alone(name), precision)


CASES = [({"pipeline": 2, "schedule": "interleaved_1f1b"}, ["t5"])]
MORE = [
    ({"pipeline": 2}, ["gpt", "t5", "experts"]),
    ({"pipeline": 2, "schedule": "interleaved_1f1b"}, ["experts"]),
    ({"pipeline": 2, "schedule": "interleaved_1f1b", "micro_batch": 4}, ["experts"]),
    ({"pipeline": 2}, ["bert", "vit", "mae", "ul2", "transformer", "roberta", "mobile", "linear"]),
    ({"pipeline": 2, "schedule": "interleaved_1f1b", "virtual": 3, "micro_batch": 1}, ["content"]),
    ({"pipeline": 4}, ["albert", "t5"]),
    ({"pipeline": 3, "schedule": "interleaved_1f1b", "virtual": 2}, ["content"]),
    ({"pipeline": 2, "shard": 2, "schedule": "interleaved_1f1b"}, ["t5"]),
    ({"pipeline": 2, "context": 2}, ["t5", "experts"]),
]


@pytest.mark.parametrize(
    ("parallel", "names"), [*CASES, *(pytest.param(*case, marks=pytest.mark.matrix) for case in MORE)]
)
def test_schedules_draw_the_curve_of_one_process(pool, parallel, names):
    """Tied tables, a block that two stages use, three micro-batches on two ranks, three stages a rank."""
    prove(pool, parallel, names)


@pytest.mark.parametrize(
    ("precision", "schedule"),
    [
        pytest.param(*each, marks=pytest.mark.matrix)
        for each in (("bf16", "1f1b"), ("fp32", "interleaved_1f1b"))
    ],
)
def test_messages_of_other_precisions(pool, precision, schedule):
    """Under autocast a stream is narrow and what routers give beside is not: in one message."""
    prove(pool, {"pipeline": 2, "schedule": schedule}, ["experts"], precision)


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
            n: (named[n].main_grad.numpy(), shard.view_as(named[n]).numpy())
            for n, shard in shards(data).items()
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
    ("name", "overlap"),
    [pytest.param(*each, marks=pytest.mark.matrix) for each in (("t5", True), ("experts", False))],
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
