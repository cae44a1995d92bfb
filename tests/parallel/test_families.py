"""One curve for every family: each at several layouts against one process, in fp64, all that is random on."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from headway.parallel import mesh
from headway.parallel.checkpoint.load import load
from headway.parallel.checkpoint.save import Checkpointer
from headway.parallel.engines.capabilities import check
from headway.pretrain.errors import JobError
from headway.pretrain.evaluate import Evaluator
from headway.tests.parallel.family_cases import CASES, job_of
from headway.tests.parallel.proof import ROWS, STEPS, Running, alone, prove, ranks_of

GOLDENS = Path(__file__).parents[1] / "goldens" / "families.json"


def test_the_curves_are_the_ones_they_always_were():
    """A change that is not meant to move the numbers must not; WRITE_GOLDENS=1 takes new ones."""
    found = {name: alone(name) for name in CASES}
    if os.environ.get("WRITE_GOLDENS"):
        table = {name: {"loss": curve.losses, "grad_norm": curve.norms} for name, curve in found.items()}
        GOLDENS.write_text(json.dumps(table, indent=1) + "\n")
    goldens = json.loads(GOLDENS.read_text())
    assert goldens.keys() == found.keys()
    for name, curve in found.items():
        # fp64; processors differ in the order of sums, which is worth 1e-16 a sum.
        assert curve.losses == pytest.approx(goldens[name]["loss"], rel=1e-12), name
        assert curve.norms == pytest.approx(goldens[name]["grad_norm"], rel=1e-11), name


@pytest.mark.parametrize(
    ("parallel", "names"),
    [
        ({"micro_batch": 3}, list(CASES)),
        pytest.param({"shard": 2}, list(CASES), marks=pytest.mark.matrix),
        pytest.param({"replicate": 2, "shard": 1, "micro_batch": 2}, list(CASES), marks=pytest.mark.matrix),
        ({"replicate": 2, "shard": 2, "micro_batch": 1}, ["bert", "experts"]),
    ],
)
def test_every_layout_draws_the_curves_of_one_process(pool, parallel, names):
    prove(pool, names, parallel)


def resumed(rank, world, parallel, folder, name, more=None):
    """The state after loading, and after the other steps."""
    running = Running(name, rank, world, parallel, more)
    state = running.engine.state()
    with torch.no_grad():
        for tensor in state.tensors.values():
            tensor.fill_(-7)
    state.numbers = load(Path(folder) / "step_00000001", state)
    running.engine.load(state)
    loaded = running.whole()
    results = [running.step(step) for step in range(1, STEPS)]
    return loaded, [r.loss for r in results], running.whole()


def saved(rank, world, parallel, folder, name, more=None):
    """Saves after a step and goes on."""
    running = Running(name, rank, world, parallel, more)
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


def evaluated(rank, world, parallel, names, more=None):
    """Name -> held-out sums after a step, of the averaged weights if there are any, and the loss of the next step."""
    found = {}
    for name in names:
        running = Running(name, rank, world, parallel, more)
        running.step(0)
        layout, collate = running.here.layout, running.objective.collate
        place = torch.device("cpu"), running.here.data_rank, layout.data
        evaluator = Evaluator(running.engine, running.stream.samples, collate, *place, rows_per_round=4)
        found[name] = (
            evaluator.sums(limit=7),
            running.step(1).loss,
        )  # seven rows fill no round of either layout
    return found


def evaluates_alike(pool, parallel, names, more=None):
    """Assert that held-out sums and the step after them are those of one process."""
    expected = evaluated(0, 1, {}, names, more)
    for found in pool(evaluated, ranks=ranks_of(parallel), parallel=parallel, names=names, more=more):
        for name, (sums, loss) in expected.items():
            assert found[name][0].keys() == sums.keys()
            for key, value in sums.items():
                assert found[name][0][key] == pytest.approx(value, rel=1e-9), (name, key)
            assert found[name][1] == pytest.approx(loss, rel=1e-9)  # the weights are back


def test_evaluation_is_the_same_at_every_layout(pool):
    names = ["vit", "deit", "albert", "mae", "dropless", "experts", "spectral"]
    evaluates_alike(pool, {"shard": 2}, names)


def test_a_ramp_that_ranks_cannot_share_is_refused():
    job = job_of("dropless", {}, STEPS, ROWS)
    with pytest.raises(JobError, match=r"train\.ramp\.start = 4: .* 3 ranks"):
        mesh.rows_per_micro_batch(job, 3)
    assert mesh.rows_per_micro_batch(job, 4) == 3


@pytest.mark.parametrize(
    ("parallel", "said"),
    [
        ({"context": 2}, r"parallel\.context = 2: .*embedded with its neighbours"),
        (
            {"recompute": "budget", "recompute_budget": 1.0},
            r"parallel\.recompute = 'budget': the memory of models with bottlenecks.* full",
        ),
    ],
)
def test_layouts_that_a_mobilebert_cannot_have_are_refused(parallel, said):
    job = job_of("mobile", parallel, STEPS, ROWS)
    with pytest.raises(JobError, match=said):
        check(job, mesh.lay_out(job.parallel, ranks_of(parallel)), "cpu")


@pytest.mark.parametrize(
    ("parallel", "said"),
    [
        ({"tensor": 3}, r"parallel\.tensor = 3: .* not cut by heads"),
        ({"pipeline": 2}, r"parallel\.pipeline = 2: .* not sent from stage to stage.*: 1\."),
        ({"context": 2}, r"parallel\.context = 2: .* needs whole rows of all heads"),
        (
            {"context": 3, "context_method": "ulysses"},
            r"parallel\.context = 3: .* needs whole rows of all heads",
        ),
        ({"recompute": "budget", "recompute_budget": 1.0}, r"parallel\.recompute = .* not known by formula"),
    ],
)
def test_layouts_that_would_lose_what_was_drawn_are_refused(parallel, said):
    job = job_of("choices", parallel, STEPS, ROWS)
    with pytest.raises(JobError, match=said):
        check(job, mesh.lay_out(job.parallel, ranks_of(parallel)), "cpu")
