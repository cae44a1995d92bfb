"""One curve: the DeepSpeed engine at every stage of ZeRO, on every axis that it has, beside native in one process."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from headway.pretrain.errors import DivergenceError
from headway.tests.parallel.engines.beside import DEEP, PLAIN, diverging, prove_engine
from headway.tests.parallel.family_cases import merged
from headway.tests.parallel.proof import Running, alone

FAMILIES = ["gpt", "bert", "t5", "experts"]


def more(*case):
    """A case of the matrix."""
    return pytest.param(*case, marks=pytest.mark.matrix)


def longer(*case):
    """A variant that is not run at every change."""
    return pytest.param(*case, marks=pytest.mark.long)


def ds(zero="auto", **axes):
    """A layout with a stage of ZeRO; keys of `parallel.deepspeed` begin with `deepspeed_`."""
    section = {k.removeprefix("deepspeed_"): axes.pop(k) for k in list(axes) if k.startswith("deepspeed_")}
    return {"engine": "deepspeed", "deepspeed": {"zero": zero} | section} | axes


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (["gpt"], ds(3, shard=2, micro_batch=3)),
        more(["experts"], ds(3, shard=2, micro_batch=3)),
        (["bert"], ds(2, shard=2, micro_batch=2)),
        (["t5"], ds(1, shard=2)),
        (["gpt"], ds(0, replicate=2)),
        (["gpt"], ds(3, shard=2, deepspeed_offload_optimizer="cpu", deepspeed_offload_parameters="cpu")),
        more(["gpt"], ds(2, shard=2, tensor=2, micro_batch=3)),
        (["experts"], ds(2, shard=2, expert=2)),
        more(["gpt"], ds(1, pipeline=2, micro_batch=6)),
        (["gpt"], ds(2, context=2, context_method="ulysses")),
        more(["t5"], ds(3, shard=2, micro_batch=3, recompute="products")),
    ],
)
def test_a_stage_of_zero_draws_the_curve_of_native(pool, names, layout):
    prove_engine(pool, names, layout)


@pytest.mark.matrix
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_family_at_every_stage(pool, ranks, zero):
    micro = {"micro_batch": 3} if ranks > 1 else {}
    prove_engine(pool, FAMILIES, ds(zero, shard=ranks, **micro))


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("ranks", [longer(1), more(2), longer(4)])
def test_every_family_in_bf16(pool, ranks, zero):
    prove_engine(pool, [*FAMILIES, "spectral"], ds(zero, shard=ranks), precision="bf16")


@pytest.mark.matrix
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", [2, 3])
def test_optimizer_and_parameters_in_host_memory(pool, zero, precision):
    kept = {"deepspeed_offload_optimizer": "cpu"}
    if zero == 3:
        kept["deepspeed_offload_parameters"] = "cpu"
    prove_engine(pool, FAMILIES, ds(zero, shard=2, micro_batch=3, **kept), precision=precision)


@pytest.mark.parametrize("sequence", [more(True), longer(False)])
@pytest.mark.parametrize("zero", [longer(0), 1, longer(2), 3])
def test_zero_beside_tensor_parallelism(pool, zero, sequence):
    layout = ds(zero, tensor=2, shard=2, sequence=sequence)
    prove_engine(pool, [*FAMILIES, "spectral", "vit"], layout)


@pytest.mark.matrix
@pytest.mark.parametrize("method", ["ring", "ulysses"])
@pytest.mark.parametrize("zero", [0, longer(2), 3])
def test_zero_beside_context_parallelism(pool, zero, method):
    prove_engine(pool, FAMILIES, ds(zero, context=2, shard=2, context_method=method))


@pytest.mark.matrix
@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize(
    "axes",
    [
        {"shard": 2, "expert": 2},
        {"shard": 4, "expert": 2},
        {"shard": 2, "tensor": 2, "expert": 4},
        {"shard": 2, "context": 2, "expert": 2},
    ],
)
def test_experts_over_ranks(pool, zero, axes):
    prove_engine(pool, ["experts"], ds(zero, **axes))


@pytest.mark.parametrize("zero", [longer(0), 1])
@pytest.mark.parametrize("axes", [{}, {"shard": 2}, {"tensor": 2}, {"context": 2}])
@pytest.mark.parametrize("name", [(more if name in ("gpt", "t5") else longer)(name) for name in FAMILIES])
def test_zero_beside_the_stages_of_a_pipeline(pool, name, axes, zero):
    prove_engine(pool, [name], ds(zero, pipeline=2, micro_batch=3, **axes), DEEP)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "schedule", ["gpipe", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"]
)
def test_every_order_of_micro_batches(pool, schedule):
    prove_engine(pool, ["gpt", "t5"], ds(1, pipeline=2, micro_batch=3, schedule=schedule), DEEP)


@pytest.mark.matrix
@pytest.mark.parametrize("zero", [0, 1])
def test_a_pipeline_in_bf16(pool, zero):
    prove_engine(pool, FAMILIES, ds(zero, pipeline=2, micro_batch=3), DEEP, precision="bf16")


@pytest.mark.parametrize("zero", [longer(0), longer(2), more(3)])
@pytest.mark.parametrize("how", [{"recompute": "full"}, {"recompute": "products"}, {"offload": True}])
def test_activations_that_are_recomputed_or_kept_elsewhere(pool, zero, how):
    prove_engine(pool, ["gpt", "t5"], ds(zero, shard=2, micro_batch=3, **how))


@pytest.mark.matrix
@pytest.mark.parametrize("zero", [2, 3])
def test_other_models_and_what_they_bring(pool, zero):
    """Shared blocks, averages, layer decay, untrained poolers, growing batches, choices, pictures."""
    names = [
        "albert",
        "roberta",
        "ul2",
        "transformer",
        "vit",
        "mae",
        "dropless",
        "content",
        "composed",
        "linear",
    ]
    prove_engine(pool, names, ds(zero, shard=2))


@pytest.mark.parametrize(
    "zero", [pytest.param(z, marks=[pytest.mark.matrix] if z % 2 else []) for z in range(4)]
)
def test_a_step_that_is_not_finite_changes_nothing(pool, zero):
    settings = merged(PLAIN, {"optimizer": {"ema": 0.9}})
    for losses in pool(diverging, ranks=2, parallel=ds(zero, shard=2), more=settings):
        np.testing.assert_allclose(losses, alone("gpt", settings, 4, "fp32").losses[1:], rtol=1e-5)


def flipped(rank, world, zero):
    """What is said of a replica that has other weights."""
    running = Running(
        "gpt", rank, world, ds(zero, replicate=world, shard=1, check_every=1), PLAIN, 4, precision="fp32"
    )
    running.step(0)
    if rank:
        running.engine.named["model.norm.weight"].data[3] += 1e-3
    with pytest.raises(DivergenceError) as found:
        running.step(1)
    return str(found.value)


def test_replicas_are_compared(pool):
    for said in pool(flipped, ranks=2, zero=0):
        assert "model.norm.weight" in said


def asked(rank, world, zero):
    """Evaluation with averaged weights, and logits and maps of whole models, amid training."""
    more = merged(PLAIN, {"optimizer": {"ema": 0.5}})
    running = Running(
        "gpt", rank, world, ds(zero, shard=world) if zero is not None else {}, more, 4, precision="fp32"
    )
    found = []
    for step in range(2):
        running.step(step)
        batch = running.stream.batch(0, 4, running.here.data_rank, running.here.layout.data)
        sums = running.engine.evaluate(running.objective.collate(batch))
        whole = running.engine.whole()
        rows = running.objective.collate(running.stream.batch(0, 4, 0, 2))
        with torch.no_grad():
            maps, logits = whole.attention_maps(rows), whole.logits(rows["tokens"])
        found.append((sums["loss"][0] / sums["loss"][1], maps.numpy(), logits.numpy()))
    return found


@pytest.mark.parametrize(
    "zero", [pytest.param(z, marks=[] if z == 3 else [pytest.mark.matrix]) for z in (0, 2, 3)]
)
def test_evaluation_and_what_people_ask_of_a_model(pool, zero):
    expected = asked(0, 1, None)
    for found in pool(asked, ranks=2, zero=zero):
        for ours, theirs in zip(found, expected, strict=True):
            for mine, right in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(mine, right, rtol=1e-5, atol=1e-6)


def replaced(rank, world):
    """Groups of ranks that come and go: an engine, then one of another size, in the same processes."""
    linear = torch.nn.functional.linear
    running = Running("gpt", rank, world, ds(3, shard=world), PLAIN, 4, precision="fp32")
    losses = [running.step(step).loss for step in range(3)]
    assert dist.get_world_size() == world
    assert torch.nn.functional.linear is linear  # DeepSpeed would put its own there, for good
    return losses


def test_engines_follow_each_other_in_one_process(pool):
    first = pool(replaced, ranks=1)
    second = pool(replaced, ranks=2)
    np.testing.assert_allclose(second, first * 2, rtol=1e-5)


@pytest.mark.matrix
def test_deeper_models(pool):
    prove_engine(pool, ["gpt", "t5"], ds(3, shard=4), DEEP)
