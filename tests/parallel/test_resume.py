"""Resume anywhere: some steps at one layout and the rest at another, against one process that was never stopped."""

from pathlib import Path

import pytest
import torch

from headway.parallel.checkpoint.load import load
from headway.parallel.checkpoint.save import Checkpointer
from headway.tests.parallel.test_families import Running

MODEL = {"heads": 4, "layers": 2}
FIRST, LAST = 6, 12


def begun(rank, world, parallel, name, folder):
    """Losses and norms of the first steps, and a checkpoint after them."""
    running = Running(name, rank, world, parallel, MODEL, LAST)
    results = [running.step(step) for step in range(FIRST)]
    with Checkpointer(Path(folder)) as checkpointer:
        checkpointer.save(FIRST, running.engine.state())
        assert checkpointer.wait()
    return [(r.loss, r.grad_norm) for r in results]


def ended(rank, world, parallel, name, folder):
    """Losses and norms of the other steps, from the checkpoint."""
    running = Running(name, rank, world, parallel, MODEL, LAST)
    state = running.engine.state()
    with torch.no_grad():
        for tensor in state.tensors.values():
            tensor.fill_(-7)
    state.numbers = load(Path(folder) / f"step_{FIRST:08}", state)
    running.engine.load(state)
    results = [running.step(step) for step in range(FIRST, LAST)]
    return [(r.loss, r.grad_norm) for r in results]


LAYOUTS = {
    "one": (1, {}),
    "accumulating": (1, {"micro_batch": 3}),
    "ddp 3": (3, {"replicate": 3, "shard": 1}),
    "shard 2": (2, {"shard": 2}),
    "shard 6": (6, {"shard": 6}),
    "hsdp 4": (4, {"replicate": 2, "shard": 2}),
    "tensor 2": (2, {"tensor": 2}),
    "tensor 4": (4, {"tensor": 4}),
    "tensor 2 shard 3": (6, {"tensor": 2, "shard": 3}),
    "tensor 2 shard 2 replicate 2": (8, {"tensor": 2, "shard": 2, "replicate": 2}),
}
PAIRS = [("tensor 2 shard 2 replicate 2", "ddp 3"), ("tensor 4", "one")]
"""From one layout to another: what `make test` runs. The matrix adds the others of a ring through all layouts."""


def rings():
    """Pairs of neighbours, and of every second, in the order of LAYOUTS: each is left twice and reached twice."""
    names = list(LAYOUTS)
    found = [(a, names[(i + by) % len(names)]) for by in (1, 2) for i, a in enumerate(names)]
    return [pytest.param(*pair, marks=pytest.mark.matrix) for pair in found if pair not in PAIRS]


@pytest.fixture(scope="module")
def straight():
    """Losses and norms of one process, by case."""
    known = {}

    def get(name):
        if name not in known:
            running = Running(name, 0, 1, {}, MODEL, LAST)
            known[name] = [(r.loss, r.grad_norm) for r in map(running.step, range(LAST))]
        return known[name]

    return get


@pytest.mark.parametrize(("here", "there"), [*PAIRS, *rings()])
@pytest.mark.parametrize("name", ["experts"])
def test_a_run_goes_on_at_another_layout(pool, straight, tmp_path, name, here, there):
    expected = straight(name)
    for part, function, layout in ((slice(0, FIRST), begun, here), (slice(FIRST, LAST), ended, there)):
        ranks, parallel = LAYOUTS[layout]
        for found in pool(function, ranks=ranks, parallel=parallel, name=name, folder=str(tmp_path)):
            for ours, theirs in zip(found, expected[part], strict=True):
                # fp64 sums in another order: 1e-16 a step, grown by twelve steps of a small network.
                assert ours == pytest.approx(theirs, rel=1e-9)
