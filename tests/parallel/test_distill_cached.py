"""A teacher from a cache: the curves of a teacher that computes, at every layout of the student and of the teacher that
filled it."""

import numpy as np
import pytest
import torch

from headway.parallel.distill.hire import DTYPES, spread_beside
from headway.parallel.distill.record import Shelves, everything, fields_of
from headway.pretrain.data.ramp import BatchSizes
from headway.pretrain.data.stream import SampleStream
from headway.pretrain.data.teacher_cache import CacheWriter, TeacherCache
from headway.pretrain.errors import DataError
from headway.tests.chosen import first
from headway.tests.parallel.distill_cases import STUDENTS
from headway.tests.parallel.family_cases import build, job_of
from headway.tests.parallel.proof import (
    ROWS,
    STEPS,
    Curve,
    Running,
    curves,
    join,
    prove,
    shape_of_teacher,
    teacher_job,
)

NAMES = sorted(STUDENTS)
LAYOUTS = [
    ({"micro_batch": 4}, NAMES),
    ({"shard": 2, "micro_batch": 3}, ["learning_gpt", "learning_bert"]),
    ({"tensor": 2}, NAMES),
    ({"context": 2}, NAMES),
    ({"pipeline": 2, "micro_batch": 4}, NAMES),
]


def keep(rank, world, names, folder, precision="fp64", dtype=None, parallel=None, steps=STEPS):
    """Write the caches of some students, one folder for each, as `headway distill cache` does."""
    for name in names:
        job = job_of(name, parallel or {}, STEPS, ROWS, precision=precision)
        here = join(job, rank, world)
        objective, samples = build(job, teacher=shape_of_teacher(name))
        theirs = teacher_job(name, precision)
        shelves = Shelves(job, theirs.model, here.layout, objective.distillation, None)
        teacher = spread_beside(shelves, here, theirs, build(theirs)[0], lambda weights: None)
        stream, sizes = SampleStream([("memory", samples, 1.0)], seed=0), BatchSizes(job.train)
        writer, wanted = None, everything(objective.distillation)
        for step in range(steps):
            rows = stream.batch(sizes.first(step), sizes.rows(step), here.data_rank, here.layout.data)
            batch = objective.collate(rows) | {"key": torch.from_numpy(rows["key"])}
            cut = job.parallel.micro_batch or len(rows["key"])
            for i in range(0, len(rows["key"]), cut):
                micro = {key: value[i : i + cut] for key, value in batch.items()}
                found = teacher.give(micro, wanted)
                fields = fields_of(found, DTYPES[dtype or precision])
                writer = writer or CacheWriter(f"{folder}/{name}", {}, fields, part=rank)
                writer.add(micro["key"], found)
        writer.close()
        here.barrier()
        if rank == 0:
            writer.publish(world)
        here.barrier()


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Folder by name of a case, in fp64."""
    folder = tmp_path_factory.mktemp("caches")
    keep(0, 1, NAMES, folder)
    return {name: f"{folder}/{name}" for name in NAMES}


@pytest.mark.parametrize(("parallel", "names"), first(2, LAYOUTS))
def test_a_student_draws_the_curve_of_a_teacher_that_computes(pool, caches, parallel, names):
    prove(pool, names, parallel, caches=caches)


def plain(curve):
    """A curve as values that are equal if their bits are."""
    metrics = [{name: value.tobytes() for name, value in step.items()} for step in curve.metrics]
    parts = [(name, begin, end, values.tobytes()) for name, begin, end, values in curve.parts]
    return [curve.losses, curve.norms, metrics, parts]


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_bits_are_those_of_a_teacher_that_computes(tmp_path, precision):
    keep(0, 1, NAMES, tmp_path, precision, steps=3)
    folders = {name: f"{tmp_path}/{name}" for name in NAMES}
    beside = curves(0, 1, {}, NAMES, 3, precision=precision)
    read = curves(0, 1, {}, NAMES, 3, precision=precision, caches=folders)
    for name in NAMES:
        assert plain(Curve(*read[name])) == plain(Curve(*beside[name])), name


ROWWISE = {"replicate": 2, "shard": 1, "tensor": 1, "context": 1}
"""Each rank of the teacher reads half of the rows of a micro-batch. All layouts below then have it compute on the same
groups of three, which is what its last bits depend on."""


@pytest.fixture(scope="module")
def groups_of_three(pool, tmp_path_factory):
    folder = tmp_path_factory.mktemp("threes")
    names = ["learning_gpt", "learning_t5"]
    parallel = {"shard": 2, "micro_batch": 3, "teacher": ROWWISE}
    pool(keep, ranks=2, timeout=300, names=names, folder=str(folder), precision="fp32", parallel=parallel)
    return {name: f"{folder}/{name}" for name in names}


@pytest.mark.parametrize(
    "axes",
    [
        {"tensor": 2, "micro_batch": 6},
        pytest.param({"shard": 2, "micro_batch": 3}, marks=pytest.mark.matrix),
        pytest.param({"context": 2, "micro_batch": 6}, marks=pytest.mark.matrix),
        pytest.param({"pipeline": 2, "micro_batch": 6}, marks=pytest.mark.matrix),
    ],
)
def test_bits_are_those_of_a_teacher_that_computes_at_every_layout(pool, groups_of_three, axes):
    settings = {"parallel": axes | {"teacher": ROWWISE}, "names": list(groups_of_three), "steps": 3}
    settings |= {"precision": "fp32"}
    beside = pool(curves, ranks=2, timeout=300, **settings)
    read = pool(curves, ranks=2, timeout=300, caches=groups_of_three, **settings)
    for ours, theirs in zip(read, beside, strict=True):
        for name in groups_of_three:
            assert plain(Curve(*ours[name])) == plain(Curve(*theirs[name])), name


def test_several_ranks_and_a_spread_teacher_write_what_one_process_writes(pool, caches, tmp_path):
    cases = {"learning_bert": {"tensor": 2}, "learning_gpt": {"context": 2}, "learning_t5": {"shard": 2}}
    for name, teacher in cases.items():
        parallel = {"shard": 2, "teacher": teacher}
        pool(keep, ranks=2, timeout=300, names=[name], folder=str(tmp_path), parallel=parallel)
        one, two = TeacherCache.open(caches[name]), TeacherCache.open(tmp_path / name)
        assert one.fields == two.fields
        assert len(one) == len(two) == STEPS * ROWS
        keys = keys_of(name)
        theirs = two.read(keys)
        for field, ours in one.read(keys).items():  # sums in another order
            torch.testing.assert_close(ours, theirs[field], rtol=1e-10, atol=1e-12)


def keys_of(name, steps=STEPS):
    samples = build(job_of(name, {}, STEPS, ROWS))[1]
    return SampleStream([("memory", samples, 1.0)], seed=0).keys(np.arange(steps * ROWS))


def test_what_is_stored_in_bf16_errs_by_its_rounding(tmp_path):
    """A feature t is stored as t + d, |d| <= u |t|, u = 2^-9. Then a mean of squares L of y - t moves by at most
    2 sqrt(L) u rms(t) + u^2 rms(t)^2 (Cauchy and Schwarz). Scores move by e <= (2 u + u^2) |q| |k| / sqrt(D),
    logarithms of weights, also of means over heads, by 2 e, and L = KL(p || r) by 2 e + (exp(2 e) - 1) (L + sqrt(2 L)),
    for the mean of |log p / r| over p is at most L + sqrt(2 L) (Pinsker). Likeliest words are stored exactly."""
    names, folders = ["learning_alibi", "learning_gpt"], {}
    for dtype in ("fp32", "bf16"):
        keep(0, 1, names, tmp_path / dtype, "fp32", dtype)
        folders[dtype] = {name: f"{tmp_path / dtype}/{name}" for name in names}
    exact, ours = (
        {name: Curve(*curve).metrics[0] for name, curve in found.items()}
        for found in (curves(0, 1, {}, names, 3, precision="fp32", caches=folders[d]) for d in folders)
    )
    moved = {
        name: {part: abs(float(ours[name][part]) - float(exact[name][part])) for part in exact[name]}
        for name in names
    }
    assert moved["learning_alibi"]["soft_loss"] == 0
    rows = TeacherCache.open(folders["fp32"]["learning_gpt"]).read(keys_of("learning_gpt", 1))
    loss, u, computed = exact["learning_gpt"], 2.0**-9, 1e-6
    square = torch.stack([x.square().mean() for name, x in rows.items() if name.endswith(".states")]).mean()
    bound = 2 * u * (float(loss["learned/states"]) * float(square)) ** 0.5 + u**2 * float(square)
    assert 0 < moved["learning_gpt"]["learned/states"] < bound + computed
    layers = [name.removesuffix(".q") for name in rows if name.endswith(".q")]
    scores = [
        (rows[f"{layer}.q"].abs().transpose(1, 2) @ rows[f"{layer}.k"].abs().permute(0, 2, 3, 1)).max()
        for layer in layers
    ]
    e = (2 * u + u**2) * float(max(scores)) / rows[f"{layers[0]}.q"].shape[-1] ** 0.5
    kl = float(loss["learned/attention"])
    bound = 2 * e + np.expm1(2 * e) * (kl + (2 * kl) ** 0.5)
    assert 0 < moved["learning_gpt"]["learned/attention"] < bound + computed


def test_samples_that_were_never_taught_are_named(tmp_path):
    keep(0, 1, ["learning_gpt"], tmp_path, steps=1)
    running = Running("learning_gpt", 0, 1, {}, cache=f"{tmp_path}/learning_gpt")
    running.step(0)
    with pytest.raises(DataError, match=r"learning_gpt: 12 of 12 samples have no row.*data, seed and steps"):
        running.step(1)


def test_an_evaluation_goes_without(tmp_path):
    keep(0, 1, ["learning_bert"], tmp_path, steps=1)
    running = Running("learning_bert", 0, 1, {}, cache=f"{tmp_path}/learning_bert")
    batch = running.objective.collate(running.stream.batch(0, ROWS))
    found = running.engine.evaluate(batch)
    assert found["loss"][0] > 0
    assert not [name for name in found if "learned" in name or "soft" in name]
