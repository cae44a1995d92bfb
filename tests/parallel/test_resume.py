"""Resume anywhere: some steps at one layout and the rest at another, against one process that was never stopped."""

from functools import cache
from pathlib import Path

import pytest
import torch

from headway.parallel.checkpoint.load import load
from headway.parallel.checkpoint.save import Checkpointer
from headway.tests.parallel.proof import Running, ranks_of

NAME, FIRST, LAST = "experts", 6, 12


def start(rank, world, parallel, layers=2, device="cpu"):
    """The case under way, with so many blocks."""
    more = {"model": {"heads": 4, "layers": layers, "unique_layers": None}}
    return Running(NAME, rank, world, parallel, more, LAST, device=device)


def begun(rank, world, parallel, folder, layers=2, device="cpu"):
    """Losses and norms of the first steps, and a checkpoint after them."""
    running = start(rank, world, parallel, layers, device)
    results = [running.step(step) for step in range(FIRST)]
    with Checkpointer(Path(folder)) as checkpointer:
        checkpointer.save(FIRST, running.engine.state())
        assert checkpointer.wait()
    return [(r.loss, r.grad_norm) for r in results]


def ended(rank, world, parallel, folder, layers=2, device="cpu"):
    """Losses and norms of the other steps, from the checkpoint."""
    running = start(rank, world, parallel, layers, device)
    state = running.engine.state()
    with torch.no_grad():
        for tensor in state.tensors.values():
            tensor.fill_(-7)
    state.numbers = load(Path(folder) / f"step_{FIRST:08}", state)
    running.engine.load(state)
    results = [running.step(step) for step in range(FIRST, LAST)]
    return [(r.loss, r.grad_norm) for r in results]


LAYOUTS = {
    "one": {},
    "accumulating": {"micro_batch": 3},
    "replicas 3": {"replicate": 3, "shard": 1},
    "shards 6": {"shard": 6},
    "shards of replicas 4": {"replicate": 2, "shard": 2},
    "tensor 4": {"tensor": 4},
    "tensor 2 x shard 3": {"tensor": 2, "shard": 3},
    "tensor 2 x shard 2 x replicate 2": {"tensor": 2, "shard": 2, "replicate": 2},
    "pipeline 2": {"pipeline": 2},
    "pipeline 2, zbv": {"pipeline": 2, "schedule": "zbv"},
    "pipeline 4 x shard 2": {"pipeline": 4, "shard": 2, "micro_batch": 1},
    "pipeline 2 x tensor 2 x context 2": {"pipeline": 2, "tensor": 2, "context": 2, "micro_batch": 3},
    "context 3": {"context": 3},
    "ulysses 4": {"context": 4, "context_method": "ulysses"},
    "expert 2 x shard 4": {"expert": 2, "shard": 4},
    "expert 4 x tensor 2 x shard 2": {"expert": 4, "tensor": 2, "shard": 2},
}
ALWAYS = [
    ("tensor 2 x shard 2 x replicate 2", "replicas 3"),
    ("expert 2 x shard 4", "one"),
]
"""From one layout to another: what `make test` runs."""
NAMED = [
    ("one", "shards 6"),
    ("tensor 4", "pipeline 2"),
    ("pipeline 4 x shard 2", "replicas 3"),
    ("pipeline 2 x tensor 2 x context 2", "context 3"),
]
"""From 1 rank to 6 and from 8 to 3. The matrix has these, and a ring through all layouts."""


def others():
    """Pairs that `make test` leaves out: each layout is left and reached at least once."""
    names = list(LAYOUTS)
    ring = [(a, names[(i + 5) % len(names)]) for i, a in enumerate(names)]
    return [pair for pair in [*NAMED, *ring] if pair not in ALWAYS]


def layers_of(*layouts):
    """Blocks of a model that some layouts share: a block for each stage."""
    return 4 if {"pipeline 2, zbv", "pipeline 4 x shard 2"} & set(layouts) else 2


@cache
def straight(layers=2):
    """Losses and norms of one process."""
    return [(r.loss, r.grad_norm) for r in map(start(0, 1, {}, layers).step, range(LAST))]


@pytest.fixture(scope="module")
def written(pool, tmp_path_factory):
    """The folder that a layout has written its checkpoint to; each is made once."""

    @cache
    def get(layout, layers):
        folder, parallel = str(tmp_path_factory.mktemp("written")), LAYOUTS[layout]
        for found in pool(
            begun, ranks=ranks_of(parallel), timeout=600, parallel=parallel, folder=folder, layers=layers
        ):
            same(found, straight(layers)[:FIRST])
        return folder

    return get


def same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        # fp64 sums in another order: 1e-16 a step, grown by twelve steps of a small network.
        assert ours == pytest.approx(theirs, rel=1e-9)


def pairs():
    """Those of `make test`, and those of the matrix; of one layout in one process, which writes a checkpoint once."""
    for pair in (*ALWAYS, *others()):
        marks = [pytest.mark.xdist_group(f"resume {pair[0]}")] + [pytest.mark.matrix] * (pair not in ALWAYS)
        yield pytest.param(*pair, marks=marks)


@pytest.mark.parametrize(("here", "there"), pairs())
def test_a_run_goes_on_at_another_layout(pool, written, here, there):
    parallel, layers = LAYOUTS[there], layers_of(here, there)
    folder = written(here, layers)
    for found in pool(
        ended, ranks=ranks_of(parallel), timeout=600, parallel=parallel, folder=folder, layers=layers
    ):
        same(found, straight(layers)[FIRST:])
