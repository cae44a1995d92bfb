"""Bytes that each axis moves in a step, counted, against the closed formulas."""

import re

import pytest
import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_to_all_single

from headway.parallel import mesh
from headway.parallel.engines.native import NativeEngine
from headway.parallel.planner import traffic as formulas
from headway.parallel.planner.traffic import Moved, added, sent
from headway.parallel.watch.counting import Traffic
from headway.pretrain.config import Job, Optimizer
from headway.pretrain.data.stream import SampleStream
from headway.pretrain.models.inputs import Inputs
from headway.tests.parallel.family_cases import LENGTH, SPECIALS, TARGET, build, job_of

ROWS = 12
SMALL = 512
"""Bytes below which a collective carries counts, sums and norms, not tensors of the model."""


def job_at(name, parallel, model=None):
    """A case with AdamW: other optimizers gather and sum for themselves. `model` changes its shape."""
    job = job_of(name, parallel, 4, ROWS)
    tree = job.model_dump() | {"optimizer": Optimizer().model_dump(), "train": job.train.model_dump()}
    tree["model"] |= model or {}
    tree["train"] |= {"ramp": {}}
    return Job.model_validate(tree)


def counted(rank, world, cases):
    """For each case (name, parallel, model): large moves by axis and kind, small ones, shapes, bytes sent."""
    found = []
    for name, parallel, model in cases:
        job = job_at(name, parallel, model)
        layout = mesh.lay_out(job.parallel, world)
        here = mesh.start(job, layout, rank, world, rank, torch.device("cpu"), "gloo")
        objective, samples = build(job)
        engine = NativeEngine(job, objective, here, precision="fp64", compiled=False)
        stream = SampleStream([("memory", samples, 1.0)], seed=0)
        for step in range(3):  # DDP arranges its buckets in the second one
            rows = stream.batch(step * ROWS, ROWS, here.data_rank, layout.data)
            with Traffic(here) as traffic:
                engine.train_step(objective.collate(rows), step)
        large = added(m for m in traffic.moves if m.bytes >= SMALL)
        small = [m for m in traffic.moves if m.bytes < SMALL]
        shapes = {n: tuple(p.shape) for n, p in engine.named.items()}
        found.append((large, small, shapes, traffic.sent()))
    return found


def inputs_of(job):
    if job.model.family == "vit":
        return Inputs(length=job.row_tokens, image=8, channels=3, classes=5)
    from headway.pretrain.data.dataset import row_lengths

    target = TARGET if job.objective.name == "pairs" else row_lengths(job)[1]
    return Inputs(vocab=SPECIALS.vocab, length=LENGTH, target_length=target)


def filling(shapes, ranks, *, blocks):
    """Bytes that FSDP2 adds to parameters so that ranks divide their first dim: of blocks, or of the rest."""
    total = 0
    for name, shape in shapes.items():
        if ("blocks." in name) == blocks:
            total += 8 * (formulas.padded(shape, ranks) - torch.Size(shape).numel())
    return total


def micro_batches(job, layout):
    return ROWS // layout.data // mesh.rows_per_micro_batch(job, layout.data)


def expected(job, layout, shapes):
    """What the formulas say, with what is filled up."""
    micros, ranks = micro_batches(job, layout), layout.shard
    moves = formulas.data_parallel(job, inputs_of(job), layout, micros)
    if ranks > 1:
        inner, outer = (filling(shapes, ranks, blocks=b) for b in (True, False))
        moves += formulas.sharded(inner, outer, micros, reshard=job.parallel.reshard)
        moves += formulas.replicated((inner + outer) / ranks) if layout.replicate > 1 else []
    return added(moves)


NAMES = ["dropless", "roberta", "ul2", "transformer", "vit", "deit", "mae"]
MATRIX = pytest.mark.long
LAYOUTS = [
    (2, {"replicate": 2, "shard": 1, "micro_batch": 2}, ["roberta"]),
    (2, {"shard": 2}, NAMES),
    (4, {"replicate": 2, "shard": 2}, ["dropless"]),
    pytest.param(2, {"replicate": 2, "shard": 1}, NAMES, marks=MATRIX),
    pytest.param(2, {"shard": 2, "reshard": False, "micro_batch": 3}, NAMES, marks=MATRIX),
    pytest.param(3, {"replicate": 3, "shard": 1}, ["dropless"], marks=MATRIX),
    pytest.param(3, {"shard": 3, "micro_batch": 2}, ["dropless", "vit"], marks=MATRIX),
    pytest.param(4, {"replicate": 2, "shard": 2, "reshard": False}, ["ul2", "mae"], marks=MATRIX),
    pytest.param(4, {"shard": 4}, ["dropless"], marks=MATRIX),
]


@pytest.mark.parametrize(("ranks", "parallel", "names"), LAYOUTS)
def test_data_parallelism_moves_what_the_formulas_say(pool, ranks, parallel, names):
    cases = [(name, parallel, None) for name in names]
    for per_rank in pool(counted, ranks=ranks, cases=cases):
        for name, (large, small, shapes, _) in zip(names, per_rank, strict=True):
            job = job_at(name, parallel)
            layout = mesh.lay_out(job.parallel, ranks)
            assert large == expected(job, layout, shapes), name
            assert {kind for _, kind, _ in small} == {"all_reduce"}, name
            assert len(small) <= 4, name  # counts, sums, and norms of one or two meshes


EVEN = {"layers": 2, "hidden": 24, "heads": 2, "ffn": 48}


def test_zero_moves_twice_and_thrice_the_parameters(pool):
    """Without anything outside of the blocks, the bytes that are sent are ZeRO's: (n - 1)/n of 2 P, 2 P and 3 P."""
    layouts = [{"replicate": 2, "shard": 1}, {"shard": 2, "reshard": False}, {"shard": 2, "reshard": True}]
    cases = [("dropless", parallel, EVEN) for parallel in layouts]
    for per_rank in pool(counted, ranks=2, cases=cases):
        (_, _, shapes, first), (_, _, _, second), (_, _, _, third) = per_rank
        sizes = {name: 8 * torch.Size(shape).numel() for name, shape in shapes.items()}
        whole = sum(sizes.values()) + filling(shapes, 2, blocks=True) + filling(shapes, 2, blocks=False)
        rest = sum(size for name, size in sizes.items() if "blocks." not in name)
        rest += filling(shapes, 2, blocks=False)
        assert first["replicate"] == pytest.approx(2 * sum(sizes.values()) / 2, abs=SMALL * 4)
        assert second["shard"] == pytest.approx(2 * whole / 2, abs=SMALL * 4)
        assert third["shard"] == pytest.approx((3 * whole - rest) / 2, abs=SMALL * 4)


def kinds(rank, world):
    """One collective of every kind along the axes of a mesh of two by two."""
    job = job_of("dropless", {"replicate": 2, "shard": 2}, 4, ROWS)
    here = mesh.start(job, mesh.Layout(replicate=2, shard=2), rank, world, rank, torch.device("cpu"), "gloo")
    group, other, four = here.group("shard"), here.group("replicate"), torch.ones(4)
    with Traffic(here) as traffic:
        dist.all_reduce(four)
        dist.all_gather_into_tensor(torch.empty(8), four, group=group)
        dist.all_gather([torch.empty(4), torch.empty(4)], four, group=other)
        dist.reduce_scatter_tensor(torch.empty(2), four, group=group)
        dist.all_to_all_single(torch.empty(4), four, group=other)
        dist.broadcast(four, 2 * here.place("replicate"), group=group)
        if here.place("shard") == 0:
            dist.send(four, rank + 1)
        else:
            dist.recv(four, rank - 1)
        all_to_all_single(four, None, None, group)
        dist.barrier()
    return traffic.moves, traffic.sent()


def test_every_kind_is_counted_along_its_axis(pool):
    for rank, (moves, total) in enumerate(pool(kinds, ranks=4)):
        point = "receive" if rank % 2 else "send"
        assert moves == [
            Moved("replicate+shard", "all_reduce", 16),
            Moved("shard", "all_gather", 32),
            Moved("replicate", "all_gather", 32),
            Moved("shard", "reduce_scatter", 16),
            Moved("replicate", "all_to_all", 16),
            Moved("shard", "broadcast", 16),
            Moved("replicate+shard", point, 16),
            Moved("shard", "all_to_all", 16),
        ]
        assert total["replicate"] == 16 + 8
        assert total["replicate+shard"] == 2 * 16 * 3 / 4 + 16 * (point == "send")


def test_what_is_sent_of_a_payload():
    assert sent("all_reduce", 100, 4) == 150
    assert sent("all_gather", 100, 4) == sent("reduce_scatter", 100, 4) == sent("all_to_all", 100, 4) == 75
    assert sent("send", 100, 2) == 100
    assert sent("receive", 100, 2) == 0
    assert sent("all_reduce", 100, 1) == 0


def test_formulas_by_hand():
    assert added(formulas.tensor_layer(10, 3)) == {("tensor", "all_reduce"): 120}
    sequence = added(formulas.tensor_layer(10, 3, sequence=True))
    assert sum(sent(kind, size, 4) for (_, kind), size in sequence.items()) == sent("all_reduce", 120, 4)
    assert added(formulas.vocabulary(10, 2)) == {("tensor", "all_reduce"): 26}
    assert added(formulas.ring(10, 4, layers=2)) == {("context", "send"): 200, ("context", "receive"): 200}
    assert added(formulas.ring(10, 1)) == {}
    assert added(formulas.ulysses(10, 4, 3, 2)) == {("context", "all_to_all"): 288}
    assert added(formulas.pipeline(10, 0, 3, 4)) == {("pipeline", "send"): 40, ("pipeline", "receive"): 40}
    assert added(formulas.pipeline(10, 1, 3, 4)) == {("pipeline", "send"): 80, ("pipeline", "receive"): 80}
    assert added(formulas.experts(5, 8, 2, 3)) == {("expert", "all_to_all"): 960}
    assert formulas.padded((67, 3), 2) == 68 * 3
    assert formulas.padded((), 4) == 4


MODEL = {"layers": 2, "hidden": 24, "heads": 4, "kv_heads": 4, "ffn": 48, "experts": {"count": 0}}
ACTIVATION = 8 * ROWS * LENGTH * 24
NUMBERS = 8 * ROWS * LENGTH


def along(pool, axis, parallel):
    """What every rank moves along an axis in a step of a small GPT of two blocks, one micro-batch."""
    for found, _ in beside_shapes(pool, axis, parallel):
        yield found


def beside_shapes(pool, axis, parallel):
    """The same, and the shapes of all parameters."""
    settings = {"shard": 1} | parallel
    for ((large, _, shapes, _),) in pool(counted, ranks=2, cases=[("dropless", settings, MODEL)]):
        yield {(a, kind): size for (a, kind), size in large.items() if a == axis}, shapes


@pytest.mark.parametrize("sequence", [False, True])
def test_tensor_parallelism_moves_four_activations_a_layer(pool, sequence):
    layers = [move for _ in range(2) for move in formulas.tensor_layer(ACTIVATION, sequence=sequence)]
    ends = formulas.vocabulary(ACTIVATION, NUMBERS) + (formulas.sequence_ends(ACTIVATION) if sequence else [])
    for found, shapes in beside_shapes(pool, "tensor", {"tensor": 2, "sequence": sequence}):
        expected = added([*layers, *ends])
        if sequence:  # norms and biases that ranks have whole see a part of the sequence each
            whole = [
                name for name in shapes if re.search(r"\.blocks\..*(_norm\.|\.o\.bias|\.down\.bias)", name)
            ]
            expected["tensor", "all_reduce"] += 8 * 24 * len(whole)
        assert found == expected


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_context_parallelism_moves_keys_and_values(pool, method):
    own = ACTIVATION / 2  # queries of a rank; keys and values are twice as much
    moves = (
        formulas.ring(2 * own, 2, layers=2) if method == "ring" else formulas.ulysses(own, 2 * own, layers=2)
    )
    for found in along(pool, "context", {"context": 2, "context_method": method}):
        expected = added(moves)
        # Parameters are sharded along the axis too, and single numbers are summed.
        rest = found.keys() - expected.keys()
        assert {kind for _, kind in rest} <= {"all_gather", "reduce_scatter", "all_reduce"}
        assert {key: found[key] for key in expected} == expected


def test_pipeline_parallelism_moves_activations(pool):
    for stage, found in enumerate(along(pool, "pipeline", {"pipeline": 2, "micro_batch": 3})):
        assert found == added(formulas.pipeline(ACTIVATION / 4, stage, 2, 4))
