"""Weights and optimizer state on disk (ZeRO-Infinity): the curve of native, checkpoints that cross over, refusals.

DeepSpeed swaps what is 1 MiB and more, of a sub-group of the optimizer's state, of a rank's part of a parameter; the
model is as wide as that asks for.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from headway.parallel.checkpoint.save import Checkpointer
from headway.parallel.engines.deepspeed.swapped import check_disk
from headway.pretrain.errors import JobError
from headway.tests.parallel.engines.beside import BOUNDS, PLAIN, compare, diverging, prove_engine, second_half
from headway.tests.parallel.family_cases import merged
from headway.tests.parallel.proof import Curve, Running, alone, hold_together, ranks_of

HALF, STEPS = 4, 8
WIDE = merged(PLAIN, {"model": {"hidden": 384}})  # 384 x 1536 in two parts: 1.1 MiB each
SIZES = {"sub_group_size": 700_000, "offload_param": {"buffer_size": 1 << 20}}
"""Several sub-groups; small buffers for parameters. Parts in two begin at odd multiples of 256 bytes."""


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A layout's settings of offload, and a folder. Compiles DeepSpeed's `async_io` where that was never done."""
    pytest.importorskip("deepspeed")
    from headway.parallel.engines.deepspeed.start import has_async_io

    if not has_async_io():
        pytest.skip("DeepSpeed's async_io cannot be built: it needs libaio-dev, g++ and ninja")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    AsyncIOBuilder().load(verbose=False)

    def get(ranks, parameters="none", sizes=SIZES):
        sizes = {k: v for k, v in sizes.items() if k != "offload_param" or parameters == "nvme"}
        section = {
            "zero": 3,
            "offload_optimizer": "nvme",
            "offload_parameters": parameters,
            "nvme_path": str(tmp_path_factory.mktemp("disk")),
            "config": json.dumps({"zero_optimization": sizes}),
        }
        return {"engine": "deepspeed", "shard": ranks, "deepspeed": section}

    return get


@pytest.mark.matrix
@pytest.mark.parametrize("parameters", ["none", "cpu", "nvme"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_curve_of_native(pool, disk, ranks, parameters):
    prove_engine(pool, ["gpt"], disk(ranks, parameters), WIDE)


@pytest.mark.matrix
@pytest.mark.parametrize("parameters", ["none", "nvme"])
def test_the_curve_in_bf16(pool, disk, parameters):
    prove_engine(pool, ["gpt"], disk(2, parameters), WIDE, precision="bf16")


def on_disk(engine):
    """How many sub-groups are on disk, and their files."""
    optimizer = engine.flats.optimizer
    groups = range(len(engine.flats.masters))
    folder = Path(optimizer.optimizer_swapper.swap_folder)
    return sum(map(optimizer._swappable_optimizer_subgroup, groups)), [f.name for f in folder.iterdir()]


def begun(rank, world, parallel, folder):
    """The first half, and a checkpoint that is copied late."""
    running = Running("gpt", rank, world, {"shard": 1} | parallel, WIDE, STEPS, precision="fp32")
    losses = [running.step(step).loss for step in range(HALF)]
    with Checkpointer(Path(folder)) as checkpointer:
        checkpointer.save(HALF, running.engine.state(), deferred=True)
        running.engine.before_update = checkpointer.copied
        losses.append(running.step(HALF).loss)
        assert checkpointer.wait()
    files = on_disk(running.engine) if parallel.get("engine") == "deepspeed" else None
    return losses, files


@pytest.mark.matrix
@pytest.mark.parametrize("parameters", ["none", "nvme"])
@pytest.mark.parametrize("back", [False, True])
def test_a_run_goes_on_natively_and_comes_back(pool, disk, tmp_path, parameters, back):
    native, swapped = {"engine": "native"}, disk(2, parameters)
    before, after = (native, swapped) if back else (swapped, native)
    whole = alone("gpt", WIDE, STEPS, "fp32")
    for losses, files in pool(
        begun, ranks=ranks_of(before), timeout=600, parallel=before, folder=str(tmp_path)
    ):
        np.testing.assert_allclose(losses, whole.losses[: HALF + 1], rtol=BOUNDS["fp32"].loss)
        if files:
            groups, names = files
            assert groups > 1
            assert len([name for name in names if "exp_avg" in name]) == 2 * groups  # they were on disk
    expected = whole._replace(
        losses=whole.losses[HALF:], norms=whole.norms[HALF:], metrics=whole.metrics[HALF:]
    )
    found = pool(
        second_half,
        ranks=ranks_of(after),
        timeout=600,
        name="gpt",
        parallel=after,
        folder=str(tmp_path),
        more=WIDE,
        first=HALF,
    )
    each = [Curve(*rank) for rank in found]
    for one in each:
        compare("gpt", one, expected, BOUNDS["fp32"])
    hold_together(each, expected)


@pytest.mark.matrix
def test_a_step_that_is_not_finite_changes_nothing(pool, disk):
    for losses in pool(diverging, ranks=2, parallel=disk(2, "nvme"), more=WIDE, timeout=600):
        np.testing.assert_allclose(losses, alone("gpt", WIDE, 4, "fp32").losses[1:], rtol=1e-5)


@pytest.mark.parametrize(
    ("zero", "possible", "field"),
    [
        ({"offload_optimizer": {"device": "nvme"}}, False, "parallel.deepspeed.offload_optimizer"),
        ({"offload_param": {"device": "nvme"}}, False, "parallel.deepspeed.offload_parameters"),
        (
            {"offload_optimizer": {"device": "nvme", "pipeline_write": True}},
            True,
            "parallel.deepspeed.config: zero_optimization.offload_optimizer.pipeline_write",
        ),
        (
            {"offload_optimizer": {"device": "nvme", "fast_init": True}},
            True,
            "parallel.deepspeed.config: zero_optimization.offload_optimizer.fast_init",
        ),
    ],
)
def test_what_cannot_be_on_disk_is_refused(zero, possible, field):
    with pytest.raises(JobError) as refusal:
        check_disk(zero, possible=lambda: possible)
    assert refusal.value.field == field


def test_what_can_be_on_disk_is_not_refused():
    check_disk({"offload_optimizer": {"device": "nvme"}}, possible=lambda: True)
    check_disk({"offload_optimizer": {"device": "cpu"}}, possible=lambda: False)
