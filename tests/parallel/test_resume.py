"""Resume anywhere: some steps at one layout and the rest at another, against one process that was never stopped."""

from pathlib import Path

import pytest
import torch

from headway.parallel.checkpoint.load import load
from headway.parallel.checkpoint.save import Checkpointer
from headway.tests.parallel.proof import Running, ranks_of

NAME, MORE = "experts", {"model": {"heads": 4, "layers": 4, "unique_layers": None}}
FIRST, LAST = 6, 12

pytestmark = pytest.mark.xdist_group("resume")  # checkpoints are written once


def begun(rank, world, parallel, folder, device="cpu"):
    """Losses and norms of the first steps, and a checkpoint after them."""
    running = Running(NAME, rank, world, parallel, MORE, LAST, device=device)
    results = [running.step(step) for step in range(FIRST)]
    with Checkpointer(Path(folder)) as checkpointer:
        checkpointer.save(FIRST, running.engine.state())
        assert checkpointer.wait()
    return [(r.loss, r.grad_norm) for r in results]


def ended(rank, world, parallel, folder, device="cpu"):
    """Losses and norms of the other steps, from the checkpoint."""
    running = Running(NAME, rank, world, parallel, MORE, LAST, device=device)
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
    ("tensor 4", "pipeline 2"),
    ("expert 2 x shard 4", "one"),
]
"""From one layout to another: what `make test` runs."""
NAMED = [
    ("one", "shards 6"),
    ("pipeline 4 x shard 2", "replicas 3"),
    ("pipeline 2 x tensor 2 x context 2", "context 3"),
]
"""From 1 rank to 6 and from 8 to 3. The matrix has these, and a ring through all layouts."""


def others():
    """Pairs that `make test` leaves out: each layout is left and reached at least once."""
    names = list(LAYOUTS)
    ring = [(a, names[(i + 5) % len(names)]) for i, a in enumerate(names)]
    return [pair for pair in [*NAMED, *ring] if pair not in ALWAYS]


@pytest.fixture(scope="module")
def straight():
    """Losses and norms of one process."""
    running = Running(NAME, 0, 1, {}, MORE, LAST)
    return [(r.loss, r.grad_norm) for r in map(running.step, range(LAST))]


@pytest.fixture(scope="module")
def written(pool, straight, tmp_path_factory):
    """The folder that a layout has written its checkpoint to; each is made once."""
    known = {}

    def get(layout):
        if layout not in known:
            known[layout] = str(tmp_path_factory.mktemp("written"))
            parallel = LAYOUTS[layout]
            for found in pool(begun, ranks=ranks_of(parallel), parallel=parallel, folder=known[layout]):
                same(found, straight[:FIRST])
        return known[layout]

    return get


def same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        # fp64 sums in another order: 1e-16 a step, grown by twelve steps of a small network.
        assert ours == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize(
    ("here", "there"), [*ALWAYS, *(pytest.param(*pair, marks=pytest.mark.matrix) for pair in others())]
)
def test_a_run_goes_on_at_another_layout(pool, straight, written, here, there):
    folder, parallel = written(here), LAYOUTS[there]
    for found in pool(ended, ranks=ranks_of(parallel), parallel=parallel, folder=folder):
        same(found, straight[FIRST:])
