"""One curve for every family: each at several layouts against one process, in fp64, all that is random on."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from headway.parallel import mesh
from headway.parallel.checkpoint.load import load
from headway.parallel.checkpoint.save import Checkpointer
from headway.parallel.engines.native import NativeEngine
from headway.pretrain.data.ramp import BatchSizes
from headway.pretrain.data.stream import SampleStream
from headway.pretrain.errors import JobError
from headway.pretrain.evaluate import Evaluator
from headway.tests.parallel.family_cases import CASES, build, job_of

STEPS, ROWS = 4, 12
GOLDENS = Path(__file__).parents[1] / "goldens" / "families.json"


class Running:
    """A case under way on one rank."""

    def __init__(self, name, rank, world, parallel, model=None, steps=STEPS):
        self.job = job_of(name, parallel, steps, ROWS, model)
        layout = mesh.lay_out(self.job.parallel, world)
        self.here = mesh.start(self.job, layout, rank, world, rank, torch.device("cpu"), "gloo")
        self.objective, samples = build(self.job)
        self.engine = NativeEngine(self.job, self.objective, self.here, precision="fp64", compiled=False)
        self.stream = SampleStream([("memory", samples, 1.0)], seed=0)
        self.sizes = BatchSizes(self.job.train)

    def step(self, number):
        first, rows = self.sizes.first(number), self.sizes.rows(number)
        batch = self.stream.batch(first, rows, self.here.data_rank, self.here.layout.data)
        return self.engine.train_step(self.objective.collate(batch), number)

    def whole(self):
        """All tensors of the state, whole: parameters, buffers, averages, moments."""
        tensors = self.engine.state().tensors
        return {
            n: (t.full_tensor() if isinstance(t, DTensor) else t).double().clone().numpy()
            for n, t in tensors.items()
        }


def curves(rank, world, parallel, names, model=None):
    """Name -> losses, gradient norms, metrics and the whole state after some steps at a layout."""
    found = {}
    for name in names:
        running = Running(name, rank, world, parallel, model)
        results = [running.step(step) for step in range(STEPS)]
        metrics = [{k: np.array(v) for k, v in r.metrics.items()} for r in results]
        found[name] = [r.loss for r in results], [r.grad_norm for r in results], metrics, running.whole()
    return found


@pytest.fixture(scope="module")
def alone():
    """The curves of one process."""
    return curves(0, 1, {}, list(CASES))


def test_the_curves_are_the_ones_they_always_were(alone):
    """A change that is not meant to move the numbers must not; WRITE_GOLDENS=1 takes new ones."""
    if os.environ.get("WRITE_GOLDENS"):
        table = {name: {"loss": losses, "grad_norm": norms} for name, (losses, norms, *_) in alone.items()}
        GOLDENS.write_text(json.dumps(table, indent=1) + "\n")
    goldens = json.loads(GOLDENS.read_text())
    assert goldens.keys() == alone.keys()
    for name, (losses, norms, *_) in alone.items():
        # fp64; processors differ in the order of sums, which is worth 1e-16 a sum.
        assert losses == pytest.approx(goldens[name]["loss"], rel=1e-12), name
        assert norms == pytest.approx(goldens[name]["grad_norm"], rel=1e-11), name


LAYOUTS = [
    (1, {"micro_batch": 3}, list(CASES)),
    (2, {"shard": 2}, list(CASES)),
    (2, {"replicate": 2, "shard": 1, "micro_batch": 2}, list(CASES)),
    (4, {"replicate": 2, "shard": 2, "micro_batch": 1}, ["bert", "experts"]),
]


@pytest.mark.parametrize(("ranks", "parallel", "names"), LAYOUTS)
def test_every_layout_draws_the_curves_of_one_process(pool, alone, ranks, parallel, names):
    for found in pool(curves, ranks=ranks, parallel=parallel, names=names):
        for name in names:
            compare(name, found[name], alone[name])


def compare(name, found, expected):
    # fp64 sums in another order: 1e-16 a step, grown by four steps of a small network.
    assert found[0] == pytest.approx(expected[0], rel=1e-9), name
    assert found[1] == pytest.approx(expected[1], rel=1e-9), name
    for step, (ours, theirs) in enumerate(zip(found[2], expected[2], strict=True)):
        assert ours.keys() == theirs.keys(), name
        for key, value in theirs.items():
            np.testing.assert_allclose(
                ours[key], value, rtol=1e-9, atol=1e-12, err_msg=f"{name} {key} {step}"
            )
    assert found[3].keys() == expected[3].keys(), name
    for key, value in expected[3].items():
        np.testing.assert_allclose(found[3][key], value, rtol=1e-8, atol=1e-10, err_msg=f"{name} {key}")


def resumed(rank, world, parallel, folder, name):
    """The state after loading, and after the other steps."""
    running = Running(name, rank, world, parallel)
    state = running.engine.state()
    with torch.no_grad():
        for tensor in state.tensors.values():
            tensor.fill_(-7)
    state.numbers = load(Path(folder) / "step_00000001", state)
    running.engine.load(state)
    loaded = running.whole()
    results = [running.step(step) for step in range(1, STEPS)]
    return loaded, [r.loss for r in results], running.whole()


def saved(rank, world, parallel, folder, name):
    """Saves after a step and goes on."""
    running = Running(name, rank, world, parallel)
    running.step(0)
    with Checkpointer(Path(folder)) as checkpointer:
        checkpointer.save(1, running.engine.state())
        assert checkpointer.wait()
    kept = running.whole()
    results = [running.step(step) for step in range(1, STEPS)]
    return kept, [r.loss for r in results], running.whole()


def test_buffers_and_averages_resume_bitwise_and_at_other_layouts(pool, tmp_path):
    """Experts with a balancing bias, spectral norms, a moving average: all are part of the state."""
    here, there = {"shard": 2}, {"replicate": 2, "shard": 1, "micro_batch": 3}
    settings = {"folder": str(tmp_path), "name": "spectral"}
    kept, losses, straight = pool(saved, ranks=2, parallel=here, **settings)[0]
    kinds = ("balance_bias", "direction", "ema.", "optimizer.")
    assert all(any(kind in name and value.any() for name, value in kept.items()) for kind in kinds)
    loaded, again, after = pool(resumed, ranks=2, parallel=here, **settings)[0]
    assert again == losses
    for name, value in kept.items():
        assert loaded[name].tobytes() == value.tobytes(), name
        assert after[name].tobytes() == straight[name].tobytes(), name
    loaded, again, after = pool(resumed, ranks=2, parallel=there, **settings)[0]
    assert again == pytest.approx(losses, rel=1e-9)
    for name, value in kept.items():
        assert loaded[name].tobytes() == value.tobytes(), name
        # As above: some steps of sums in another order.
        np.testing.assert_allclose(after[name], straight[name], rtol=1e-8, atol=1e-10, err_msg=name)


def evaluated(rank, world, parallel, names):
    """Name -> held-out sums after a step, of the averaged weights if there are any, and the loss of the next step."""
    found = {}
    for name in names:
        running = Running(name, rank, world, parallel)
        running.step(0)
        layout, collate = running.here.layout, running.objective.collate
        place = torch.device("cpu"), running.here.data_rank, layout.data
        evaluator = Evaluator(running.engine, running.stream.samples, collate, *place, rows_per_round=4)
        found[name] = (
            evaluator.sums(limit=7),
            running.step(1).loss,
        )  # seven rows fill no round of either layout
    return found


def test_evaluation_is_the_same_at_every_layout(pool):
    names = ["vit", "albert", "mae", "dropless", "experts", "spectral"]
    alone = evaluated(0, 1, {}, names)
    for found in pool(evaluated, ranks=2, parallel={"shard": 2}, names=names):
        for name, (sums, loss) in alone.items():
            assert found[name][0].keys() == sums.keys()
            for key, value in sums.items():
                assert found[name][0][key] == pytest.approx(value, rel=1e-9), (name, key)
            assert found[name][1] == pytest.approx(loss, rel=1e-9)  # the weights are back


def test_a_ramp_that_ranks_cannot_share_is_refused():
    job = job_of("dropless", {}, STEPS, ROWS)
    with pytest.raises(JobError, match=r"train\.ramp\.start = 4: .* 3 ranks"):
        mesh.rows_per_micro_batch(job, 3)
    assert mesh.rows_per_micro_batch(job, 4) == 3
