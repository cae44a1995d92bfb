"""Crossing over: four steps with one engine, a checkpoint, four with another, against eight of native in one process.

Weights, moments, averages and buffers go along; on disk there is one format, whoever wrote it.
"""

from functools import cache
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from headway.parallel.checkpoint.manifest import read_manifest
from headway.parallel.checkpoint.save import Checkpointer
from headway.tests.parallel.engines.beside import BOUNDS, PLAIN, compare, second_half
from headway.tests.parallel.family_cases import merged
from headway.tests.parallel.proof import Curve, Running, alone, hold_together, ranks_of

HALF, STEPS = 4, 8
MORE = merged(PLAIN, {"optimizer": {"ema": 0.9}})
FAMILIES = ["gpt", "bert", "t5", "experts"]

LAYOUTS = {
    "native": {"engine": "native", "tensor": 2, "shard": 2},
    "deepspeed": {"engine": "deepspeed", "shard": 2},
    "megatron": {"engine": "megatron", "tensor": 2, "shard": 2},
}
OTHERS = {
    "native, pipeline": {"engine": "native", "pipeline": 2, "micro_batch": 6},
    "native, one process": {"engine": "native"},
    "deepspeed, ZeRO 1": {"engine": "deepspeed", "shard": 4, "deepspeed": {"zero": 1}},
    "deepspeed, ZeRO 2, offload": {
        "engine": "deepspeed",
        "shard": 2,
        "deepspeed": {"zero": 2, "offload_optimizer": "cpu"},
    },
    "deepspeed, one process": {"engine": "deepspeed"},
    "megatron, pipeline": {"engine": "megatron", "pipeline": 2, "micro_batch": 6},
    "megatron, whole optimizer": {
        "engine": "megatron",
        "shard": 2,
        "megatron": {"distributed_optimizer": False},
    },
    "megatron, one process": {"engine": "megatron"},
}
ALWAYS = [("native", "deepspeed"), ("deepspeed", "megatron"), ("megatron", "native")]
"""What `make test` runs; the matrix has all ordered pairs of the engines, and a ring through the other layouts."""


def begun(rank, world, name, parallel, folder):
    """The first half, and a checkpoint after it."""
    running = Running(name, rank, world, {"shard": 1} | parallel, MORE, STEPS, precision="fp32")
    losses = [running.step(step).loss for step in range(HALF)]
    with Checkpointer(Path(folder)) as checkpointer:
        checkpointer.save(HALF, running.engine.state())
        assert checkpointer.wait()
    return losses


@pytest.fixture(scope="module")
def written(pool, tmp_path_factory):
    """The folder that a layout has written its checkpoint to; each is made once."""

    @cache
    def get(name, layout):
        folder, parallel = str(tmp_path_factory.mktemp("written")), (LAYOUTS | OTHERS)[layout]
        for losses in pool(
            begun, ranks=ranks_of(parallel), timeout=600, name=name, parallel=parallel, folder=folder
        ):
            whole = alone(name, MORE, STEPS, "fp32").losses[:HALF]
            np.testing.assert_allclose(losses, whole, rtol=BOUNDS["fp32"].loss)
        return folder

    return get


def cross(pool, written, name, before, after):
    parallel = (LAYOUTS | OTHERS)[after]
    folder = written(name, before)
    whole = alone(name, MORE, STEPS, "fp32")
    expected = whole._replace(
        losses=whole.losses[HALF:], norms=whole.norms[HALF:], metrics=whole.metrics[HALF:]
    )
    found = pool(
        second_half,
        ranks=ranks_of(parallel),
        timeout=600,
        name=name,
        parallel=parallel,
        folder=folder,
        more=MORE,
        first=HALF,
    )
    each = [Curve(*rank) for rank in found]
    for one in each:
        compare(name, one, expected, BOUNDS["fp32"])
    hold_together(each, expected)


def marked(pairs):
    return [
        pytest.param(
            *pair,
            marks=[pytest.mark.xdist_group(f"cross {pair[0]}")]
            + ([] if pair in ALWAYS else [pytest.mark.matrix]),
        )
        for pair in pairs
    ]


@pytest.mark.parametrize(("before", "after"), marked(permutations(LAYOUTS, 2)))
def test_a_run_goes_on_with_another_engine(pool, written, before, after):
    cross(pool, written, "gpt", before, after)


@pytest.mark.matrix
@pytest.mark.parametrize("name", FAMILIES[1:])
@pytest.mark.parametrize(("before", "after"), list(permutations(LAYOUTS, 2)))
def test_every_family_goes_on_with_another_engine(pool, written, name, before, after):
    cross(pool, written, name, before, after)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("before", "after"), [(a, [*OTHERS][(i + 3) % len(OTHERS)]) for i, a in enumerate(OTHERS)]
)
def test_a_ring_through_the_layouts_of_engines(pool, written, before, after):
    cross(pool, written, "gpt", before, after)


def test_the_format_on_disk_is_one(written):
    tensors = {}
    for layout in LAYOUTS:
        manifest = read_manifest(Path(written("gpt", layout)) / f"step_{HALF:08}")
        tensors[layout] = {name: (entry.dtype, entry.shape) for name, entry in manifest.tensors.items()}
    assert tensors["native"] == tensors["deepspeed"] == tensors["megatron"]
