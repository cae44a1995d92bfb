"""fp8 on a machine without it: torchao computes the same numbers in wider floats; and who is refused."""

from unittest.mock import patch

import pytest
import torch

from headway.parallel.float8 import check_float8
from headway.parallel.mesh import Layout
from headway.parallel.planner.describe import describe
from headway.parallel.planner.memory import peak
from headway.pretrain.errors import JobError
from headway.pretrain.models.inputs import Inputs
from headway.tests.parallel.family_cases import job_of
from headway.tests.parallel.proof import STEPS, Curve, Running, alone, curves, prove

WIDE = {"model": {"hidden": 32, "heads": 2, "ffn": 64}}


def test_layers_of_blocks_are_swapped_and_names_stay():
    eight, wide = (Running("gpt", 0, 1, {}, WIDE, precision=p).objective for p in ("fp8", "fp32"))
    kinds = {name: type(m).__name__ for name, m in eight.named_modules()}
    assert [n for n in kinds if kinds[n] == "Float8Linear"] == [
        f"model.blocks.{i}.{name}"
        for i in range(2)
        for name in ("attention.q", "attention.k", "attention.v", "attention.o", "mlp.up", "mlp.down")
    ]
    assert [n for n, _ in eight.named_parameters()] == [n for n, _ in wide.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(eight.parameters(), wide.parameters(), strict=True))


@pytest.mark.parametrize("name", ["gpt", "experts"])
def test_the_curve_is_near_that_of_fp64_and_not_that_of_bf16(name):
    found = {
        p: Curve(*curves(0, 1, {}, [name], STEPS, more=WIDE, precision=p)[name]) for p in ("fp8", "bf16")
    }
    # An e4m3 has 3 bits of mantissa: products err by 2^-4 relative, and a mean of losses by far less.
    assert found["fp8"].losses == pytest.approx(alone(name, WIDE).losses, rel=2e-2)
    assert found["fp8"].losses != found["bf16"].losses


@pytest.mark.parametrize(
    "parallel",
    [
        {"shard": 2},
        pytest.param({"replicate": 2, "shard": 1, "micro_batch": 2}, marks=pytest.mark.long),
        pytest.param({"context": 2}, marks=pytest.mark.long),
        pytest.param({"pipeline": 2, "micro_batch": 3}, marks=pytest.mark.long),
        pytest.param({"pipeline": 2, "shard": 2, "micro_batch": 3}, marks=pytest.mark.long),
    ],
)
def test_layouts_stay_near(pool, parallel):
    prove(pool, ["gpt"], parallel, WIDE, precision="fp8")


def test_memory_is_that_of_bf16():
    plans = [
        describe(job_of("gpt", {}, 4, 12, WIDE, precision), Inputs(67, 16), Layout(), 0, precision=precision,
                 device="cuda", compiled=False)
        for precision in ("fp8", "bf16")
    ]  # fmt: skip
    assert peak(plans[0]).bytes == peak(plans[1]).bytes


def refused(more, layout, capability=(9, 0), device="cuda"):
    job = job_of("gpt", {}, 4, 12, more, "fp8")
    with (
        patch.object(torch.cuda, "get_device_capability", lambda: capability),
        pytest.raises(JobError) as raised,
    ):
        check_float8(job, layout, device)
    return str(raised.value)


def test_what_cannot_be_is_refused():
    assert "capability 9.0 (Hopper)" in refused(WIDE, Layout(), device="cpu")
    assert "capability 9.0 (Hopper)" in refused(WIDE, Layout(), (8, 9))
    assert "parallel.tensor = 1" in refused(WIDE, Layout(tensor=2))
    assert "model.spectral" in refused({"model": WIDE["model"] | {"spectral": True}}, Layout())
    text = refused({"model": {"hidden": 40, "heads": 2}}, Layout())
    assert "model.hidden = 40: must be a multiple of 16 in fp8" in text
    assert "48" in text
    shared = {"experts": {"count": 4, "shared": 1, "ffn": 20}}
    assert "model.experts.ffn = 20" in refused({"model": WIDE["model"] | shared}, Layout())
    with patch("importlib.util.find_spec", lambda name: None):
        assert "headway[fp8]" in refused(WIDE, Layout())
    with patch.object(torch.cuda, "get_device_capability", lambda: (9, 0)):
        check_float8(job_of("gpt", {}, 4, 12, WIDE, "fp8"), Layout(shard=2), "cuda")
