"""The Megatron-Core engine draws the native engine's curves: eight steps beside native in one process."""

from functools import partial
from importlib.util import find_spec
from unittest.mock import patch

import numpy as np
import pytest
import torch

from headway.parallel.checkpoint.layout import held
from headway.parallel.recompute import offload
from headway.pretrain.errors import NonFiniteError
from headway.tests.parallel.engines.beside import DEEP, PLAIN, prove_engine
from headway.tests.parallel.family_cases import merged
from headway.tests.parallel.proof import Running

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")

MEGATRON = {"engine": "megatron"}
WHOLE = {"megatron": {"distributed_optimizer": False}}
OVERLAP = {"megatron": {"overlap_grad_reduce": True, "overlap_param_gather": True}}
FAMILIES = ["gpt", "bert", "t5", "vit", "experts"]
more = partial(pytest.param, marks=pytest.mark.matrix)


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (["gpt", "t5"], {"tensor": 2}),
        (["bert", "experts"], {"shard": 2, "micro_batch": 3}),
        more(FAMILIES, {}),
        more(["bert", "vit", "experts", "albert", "roberta", "ul2", "transformer"], {"tensor": 2}),
        more(["dropless", "deit", "mae", "spectral", "inverted"], {"tensor": 2}),
        more(FAMILIES, {"tensor": 2, "sequence": False, "micro_batch": 4}),
        more(["gpt", "t5", "vit", "albert", "dropless", "spectral"], {"shard": 2}),
        more(FAMILIES, {"replicate": 2, **WHOLE}),
        more(["gpt", "bert", "experts", "dropless"], {"shard": 2, "micro_batch": 3, **OVERLAP}),
        more(["gpt", "bert", "t5", "experts"], {"context": 2}),
        more(["gpt", "t5"], {"context": 2, "context_method": "ulysses"}),
        more(FAMILIES, {"tensor": 2, "shard": 2, "micro_batch": 3}),
        more(["gpt", "t5"], {"replicate": 2, "shard": 2, "micro_batch": 3}),
        more(["gpt"], {"tensor": 2, "replicate": 2, **WHOLE}),
        more(["t5"], {"tensor": 2, "context": 2}),
        more(["gpt", "experts"], {"shard": 2, "recompute": "full"}),
        more(["gpt"], {"shard": 2, "check_every": 3, **WHOLE}),
        more(["gpt"], {"tensor": 2, "check_every": 3}),
    ],
)
def test_layouts(pool, names, layout):
    prove_engine(pool, names, MEGATRON | layout)


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (["gpt"], {"pipeline": 2, "micro_batch": 3}),
        more(["t5", "bert", "experts"], {"pipeline": 2, "micro_batch": 3}),
        more(["gpt", "t5", "experts"], {"pipeline": 2, "micro_batch": 3, "schedule": "interleaved_1f1b"}),
        more(["gpt", "t5", "experts"], {"pipeline": 2, "tensor": 2, "micro_batch": 3}),
        more(["gpt", "t5", "experts"], {"pipeline": 2, "shard": 2, "micro_batch": 3}),
        more(["gpt", "t5"], {"pipeline": 2, "shard": 2, "micro_batch": 3, **OVERLAP}),
        more(["gpt"], {"pipeline": 2, "context": 2, "micro_batch": 3}),
    ],
)
def test_pipelines(pool, names, layout):
    """Megatron's schedules; copies of a tied table move alike, and only one of them counts in the norm."""
    prove_engine(pool, names, MEGATRON | layout, DEEP)


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (["experts"], {"shard": 2, "expert": 2}),
        more(["roberta"], {"shard": 2, "expert": 2}),
        more(["experts", "roberta"], {"tensor": 2, "shard": 2, "expert": 4, "micro_batch": 3}),
        more(["dropless", "transformer"], {"tensor": 2, "expert": 2}),
        more(["experts"], {"replicate": 2, "shard": 2, "expert": 2, "micro_batch": 3}),
        more(["experts"], {"replicate": 2, "tensor": 2, "expert": 2, **WHOLE}),
        more(["experts"], {"pipeline": 2, "shard": 2, "expert": 2, "micro_batch": 3}),
    ],
)
def test_experts_are_spread(pool, names, layout):
    """Through Megatron's dispatcher, with capacity, choice by experts, and choice by tokens without a bound."""
    prove_engine(pool, names, MEGATRON | layout, {"model": {"experts": {"count": 4}}})


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (["gpt"], {"tensor": 2}),
        more(FAMILIES, {"shard": 2, "micro_batch": 3}),
        more(FAMILIES, {"tensor": 2}),
        more(["gpt", "t5"], {"replicate": 2, **WHOLE}),
        more(["experts"], {"shard": 2, "expert": 2}),
        more(["gpt", "t5"], {"pipeline": 2, "shard": 2, "micro_batch": 3, **OVERLAP}),
    ],
)
def test_bf16(pool, names, layout):
    """Narrow weights of products, fp32 main parameters and gradients, beside native's autocast."""
    prove_engine(pool, names, MEGATRON | layout, DEEP, precision="bf16")


@pytest.mark.matrix
@pytest.mark.parametrize("layout", [{"shard": 2, "micro_batch": 3}, {"tensor": 2}])
def test_fp16(pool, layout):
    """With a loss scale, which is ours."""
    prove_engine(pool, ["gpt", "t5", "experts"], MEGATRON | layout, precision="fp16")


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "layers"), [("content", 6), ("composed", 5), ("linear", 5), ("mobile", 2)])
def test_mechanisms(pool, name, layers):
    """The model stays ours: sixteen mechanisms, and layers of other shapes, with Megatron's linears in them. The rate
    is a small one: at 1e-2 rounding moves the last losses of some by 1e-5, on two ranks of the native engine too."""
    more = {"model": {"layers": layers}, "optimizer": {"lr": 1e-3}}
    prove_engine(pool, [name], MEGATRON | {"tensor": 2}, more)


# -- one rank --------------------------------------------------------------------------------------------------


def values(running):
    """All parts of the state on this rank."""
    return {(p.name, p.box): p.view.clone() for p in held(running.engine.state().tensors)}


def overflow(rank, world):
    running = Running("gpt", rank, world, {"shard": 2, **MEGATRON}, PLAIN, 4, precision="fp32")
    running.step(0)
    before = values(running)
    count = running.engine._global_counts
    running.engine._global_counts = lambda batch: dict.fromkeys(count(batch), 1e-40) | {"read": 1, "rows": 1}
    running.engine._differentiated = lambda out, counts, weight=1.0: sum(out.terms.values()) * float("inf")
    with pytest.raises(NonFiniteError, match="step 1"):
        running.step(1)
    del running.engine._global_counts, running.engine._differentiated
    unmoved = all(torch.equal(value, before[key]) for key, value in values(running).items())
    return unmoved, running.step(1).loss


def test_a_gradient_that_is_not_finite_changes_nothing(pool):
    """And the step can be taken again."""
    expected = Running("gpt", 0, 1, {}, PLAIN, 4, precision="fp32")
    losses = [expected.step(step).loss for step in range(2)]
    for unmoved, loss in pool(overflow, ranks=2, timeout=300):
        assert unmoved
        assert loss == pytest.approx(losses[1], rel=1e-5)


def too_large(rank, world):
    """A step whose gradients overflow in fp16, and one after it."""
    running = Running("gpt", rank, world, {"shard": 2, **MEGATRON}, PLAIN, 4, precision="fp16")
    before, running.engine.scale.scale = values(running), 2.0**40
    result = running.step(0)
    unmoved = all(torch.equal(value, before[key]) for key, value in values(running).items())
    running.engine.scale.scale = 2.0**10
    return result.skipped, unmoved, result.metrics["loss_scale"], running.step(1).skipped


def test_an_overflow_in_fp16_leaves_a_step_out(pool):
    for found in pool(too_large, ranks=2, timeout=300):
        assert found == (True, True, 2.0**39, False)


def layers_of(rank, world):
    """Types of layers, and of what they hold."""
    running = Running("experts", rank, world, {"tensor": 2, **MEGATRON}, PLAIN, 4, precision="bf16")
    block, table = running.objective.model.blocks[0], running.objective.model.embed.tokens
    with torch.no_grad():
        logits = running.engine.whole().eval().logits(torch.arange(32).view(2, 16))
    return {
        "q": type(block.attention.q).__mro__[1].__name__,
        "o": type(block.attention.o).__mro__[1].__name__,
        "shared": type(block.mlp.shared.up).__mro__[1].__name__,
        "table": type(table).__mro__[1].__name__,
        "words": len(table.weight),
        "dtypes": {str(p.dtype) for p in (block.attention.q.weight, block.mlp.up)},
        "wide": {str(p.dtype) for p in (table.weight, block.mlp.router.weight)},
        "logits": logits.float().numpy(),
        "extra": [name for name in running.objective.state_dict() if "extra_state" in name],
    }


def test_layers_are_megatrons(pool):
    """Narrow where products alone read them; what people ask of the model is asked under autocast. Logits of weights
    that were rounded to 2^-9 are within 2 % of the largest."""
    first, last = pool(layers_of, ranks=2, timeout=300)
    alone = Running("experts", 0, 1, {}, PLAIN, 4, precision="fp32").objective.eval()
    with torch.no_grad():
        expected = alone.logits(torch.arange(32).view(2, 16)).numpy()
    for found in (first.pop("logits"), last["logits"]):
        np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())
    assert first == {
        "q": "ColumnParallelLinear", "o": "RowParallelLinear", "shared": "ColumnParallelLinear",
        "table": "VocabParallelEmbedding", "words": 34, "dtypes": {"torch.bfloat16"},
        "wide": {"torch.float32"}, "extra": [],
    }  # fmt: skip
    assert last["words"] == 33  # of 67: the last rank has fewer


def one_after_another(rank, world):
    """Losses of two layouts in one process; Megatron's groups are globals of a module."""
    found = []
    for layout in ({"tensor": 2}, {"shard": 2}, {"tensor": 2}):
        running = Running("gpt", rank, world, {"shard": 1, **layout, **MEGATRON}, PLAIN, 4, precision="fp32")
        found.append([running.step(step).loss for step in range(2)])
    return found


def test_layouts_follow_each_other_in_one_process(pool):
    for found in pool(one_after_another, ranks=2, timeout=300):
        np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
        assert found[0] == found[2]


def offloaded(rank, world):
    """Losses of three steps whose activations wait in host memory."""
    layout = {"shard": 1, "tensor": 2, "recompute": "products", "offload": True, **MEGATRON}
    with patch.object(offload, "SMALL", 64):
        running = Running("t5", rank, world, layout, PLAIN, 4, precision="fp32")
        return [running.step(step).loss for step in range(3)]


@pytest.mark.matrix
def test_activations_wait_in_host_memory(pool):
    alone = Running("t5", 0, 1, {}, PLAIN, 4, precision="fp32")
    expected = [alone.step(step).loss for step in range(3)]
    for found in pool(offloaded, ranks=2, timeout=300):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def evaluated(rank, world):
    settings = merged(PLAIN, {"optimizer": {"ema": 0.5}})
    running = Running("gpt", rank, world, {"shard": 2, **MEGATRON, **OVERLAP}, settings, 4, precision="fp32")
    for step in range(3):
        running.step(step)
    rows = running.stream.batch(0, 12, running.here.data_rank, 2)
    before = values(running)
    sums = running.engine.evaluate(running.objective.collate(rows))
    same = all(torch.equal(value, before[key]) for key, value in values(running).items())
    return sums["loss"], same, running.engine.parameters()


def test_evaluation_has_the_average_and_puts_the_weights_back(pool):
    settings = merged(PLAIN, {"optimizer": {"ema": 0.5}})
    alone = Running("gpt", 0, 1, {}, settings, 4, precision="fp32")
    for step in range(3):
        alone.step(step)
    total, count = alone.engine.evaluate(alone.objective.collate(alone.stream.batch(0, 12, 0, 1)))["loss"]
    for sums, same, count_of_parameters in pool(evaluated, ranks=2, timeout=300):
        assert same
        assert count_of_parameters == alone.engine.parameters()
        assert sums == (pytest.approx(total, rel=1e-5), count)
