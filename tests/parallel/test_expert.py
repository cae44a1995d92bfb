"""Experts spread over ranks: the curves of one process, checkpoints across layouts, and what is refused."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from headway.parallel import mesh
from headway.parallel.engines.capabilities import check
from headway.parallel.expert import ROUTED
from headway.parallel.mesh import Layout, lay_out
from headway.pretrain.config import Job, Parallel
from headway.pretrain.errors import JobError
from headway.tests.chosen import first
from headway.tests.parallel.family_cases import job_of
from headway.tests.parallel.proof import Running, prove
from headway.tests.parallel.test_families import evaluates_alike, resumed, saved


def variant(name, optimizer=None, **experts):
    """A case with four heads, which two ranks cut, another number of experts and another optimizer."""
    return name, {"model": {"heads": 4, "experts": experts}, "optimizer": optimizer or {}}


VARIANTS = {
    "experts": variant("experts"),  # capacity, shared, bias balance, Muon
    "roberta": variant("roberta"),  # experts choose
    "dropless": variant("dropless", {"name": "lamb"}, count=4),
    "transformer": variant(
        "transformer", {"name": "adafactor"}, count=4
    ),  # one expert a token, in both towers
    "spectral": variant("spectral", count=4),
    "transformer of 3": variant("transformer"),
    "spectral of 3": variant("spectral"),
    "two": variant("spectral", {"name": "muon"}, count=2),
    "two, lamb": variant("spectral", {"name": "lamb"}, count=2),
    "two, adafactor": variant("spectral", {"name": "adafactor"}, count=2),
    "batched": variant("experts", {"name": "adamw", "ema": 0.9}, count=4, kernel="batched", capacity=0.6),
    "reference": variant("dropless", count=4, kernel="reference"),
}
FOUR = ["experts", "roberta", "dropless", "transformer", "spectral", "batched", "reference"]

long = pytest.mark.long
LAYOUTS = [
    ({"expert": 2, "shard": 2}, ["experts", "roberta", "dropless"]),
    ({"expert": 2, "shard": 1, "tensor": 2}, ["transformer"]),
    ({"expert": 3, "shard": 3, "micro_batch": 2}, ["spectral of 3"]),
    ({"expert": 2, "shard": 4}, ["experts", "two"]),  # copies share by experts, and by rows of each
    ({"expert": 2, "replicate": 2, "shard": 2, "micro_batch": 1}, ["roberta"]),
    pytest.param({"expert": 2, "shard": 2, "micro_batch": 3}, FOUR, marks=long),
    pytest.param({"expert": 2, "shard": 2, "reshard": False, "micro_batch": 2}, ["experts"], marks=long),
    pytest.param({"expert": 3, "shard": 3}, ["transformer of 3"], marks=long),
    pytest.param({"expert": 2, "shard": 4, "micro_batch": 1}, FOUR, marks=long),
    pytest.param({"expert": 2, "shard": 4}, ["two, lamb", "two, adafactor"], marks=long),
    pytest.param({"expert": 4, "shard": 4}, FOUR, marks=long),
    pytest.param({"expert": 2, "replicate": 2, "shard": 2}, FOUR, marks=long),
    # Along the tensor axis ranks share the tokens of experts.
    pytest.param({"expert": 2, "shard": 1, "tensor": 4}, FOUR, marks=long),
    pytest.param({"expert": 4, "shard": 2, "tensor": 2, "micro_batch": 2}, FOUR, marks=long),
    pytest.param({"expert": 2, "shard": 2, "tensor": 2}, ["experts", "transformer"], marks=long),
    pytest.param({"expert": 2, "shard": 6}, ["experts", "transformer"], marks=long),  # copies share unevenly
    pytest.param({"expert": 2, "replicate": 2, "shard": 2, "tensor": 2}, ["dropless", "experts"], marks=long),
]  # fmt: skip


@pytest.mark.parametrize(("parallel", "variants"), first(3, LAYOUTS))
def test_every_layout_draws_the_curves_of_one_process(pool, parallel, variants):
    for name, more in map(VARIANTS.get, variants):
        prove(pool, [name], parallel, more)


def test_evaluation_is_the_same(pool):
    name, more = VARIANTS["spectral"]
    evaluates_alike(pool, {"expert": 2, "shard": 2}, [name], more)


def held(rank, world, parallel):
    """Name -> elements of this rank's part of routed experts, and of the whole."""
    named = Running("experts", rank, world, parallel).engine.named
    routed = {n: p for n, p in named.items() if n.split(".")[-1] in ROUTED and "shared" not in n}
    assert routed
    assert all(isinstance(p, DTensor) for p in routed.values())
    return {n: (p.to_local().numel(), p.numel()) for n, p in routed.items()}


def test_a_rank_holds_its_share(pool):
    for ranks, expert in ((2, 2), (4, 2)):
        for found in pool(held, ranks=ranks, parallel={"expert": expert, "shard": ranks}):
            assert all(part * ranks == whole for part, whole in found.values())


OTHERS = [
    (1, {}),
    (2, {"shard": 2}),
    pytest.param(4, {"expert": 4, "shard": 4}, marks=long),
    pytest.param(4, {"expert": 2, "replicate": 2, "shard": 2}, marks=long),
    pytest.param(6, {"expert": 2, "shard": 6}, marks=long),
    pytest.param(2, {"expert": 2, "shard": 1, "tensor": 2}, marks=long),
]
KEPT = ["batched", "transformer"]  # an average and a balancing bias; Adafactor, two towers


@pytest.fixture(scope="module")
def written(pool, tmp_path_factory):
    """Name -> how it was saved, and what was saved and came after, with experts over two ranks."""
    found = {}
    for variant in KEPT:
        name, more = VARIANTS[variant]
        settings = {"folder": str(tmp_path_factory.mktemp("experts")), "name": name, "more": more}
        found[variant] = settings, pool(saved, ranks=2, parallel={"expert": 2, "shard": 2}, **settings)[0]
    return found


@pytest.mark.parametrize(("ranks", "parallel"), first(1, OTHERS))
def test_a_checkpoint_loads_bitwise_at_other_layouts(pool, written, ranks, parallel):
    for name, (settings, (kept, losses, straight)) in written.items():
        loaded, again, after = pool(resumed, ranks=ranks, parallel=parallel, **settings)[0]
        assert again == pytest.approx(losses, rel=1e-9)
        assert loaded.keys() == kept.keys()
        for key, value in kept.items():
            assert loaded[key].tobytes() == value.tobytes(), (name, key)
            # fp64: three steps of sums in another order.
            assert after[key] == pytest.approx(straight[key], rel=1e-8, abs=1e-10), (name, key)


def test_layouts():
    assert lay_out(Parallel(expert=2), 4) == Layout(shard=4, expert=2)
    assert lay_out(Parallel(expert=-1, replicate=2), 8) == Layout(replicate=2, shard=4, expert=4)
    assert str(Layout(shard=4, expert=2)) == "shard 4, experts over 2"
    with pytest.raises(JobError, match=r"parallel\.expert = 0: an axis has at least one rank"):
        lay_out(Parallel(expert=0), 4)


@pytest.mark.parametrize(
    ("name", "ranks", "parallel", "message"),
    [
        ("bert", 2, {"expert": 2}, r"expert = 2: model\.experts\.count is 0: .* choice: 1"),
        ("experts", 4, {"expert": 3}, r"expert = 3: must divide shard x context x tensor = 4.* choice: 2"),
        ("experts", 4, {"expert": 4, "replicate": 2}, r"expert = 4: must divide shard .* = 2.* choice: 2"),
        ("dropless", 2, {"expert": 2}, r"expert = 2: must divide model\.experts\.count = 5.* choice: 1"),
        (
            "transformer",
            6,
            {"expert": -1},
            r"expert = -1: 6 ranks here; must divide model\.experts\.count = 3.* choice: 3",
        ),
    ],
)
def test_what_cannot_be_spread_is_refused(name, ranks, parallel, message):
    job: Job = job_of(name, parallel, 4, 12)
    with pytest.raises(JobError, match=message):
        check(job, lay_out(job.parallel, ranks), "cpu")


def test_what_can_be_spread_is_not():
    for ranks, parallel in ((4, {"expert": 2}), (8, {"expert": -1, "replicate": 2})):
        job = job_of("experts", parallel, 4, 12)
        check(job, lay_out(job.parallel, ranks), "cpu")


def test_an_older_torch_has_each_expert_once(monkeypatch):
    monkeypatch.delattr("torch.distributed.fsdp._fully_shard._fsdp_common.ShardPlacementResult")
    job = job_of("experts", {"expert": 2}, 4, 12)
    check(job, lay_out(job.parallel, 2), "cpu")
    with pytest.raises(JobError, match=r"parallel\.expert = 2: .*torch 2\.13 can.* 4"):
        check(job, lay_out(job.parallel, 4), "cpu")


def meshes(rank, world):
    job = job_of("experts", {"expert": 2}, 4, 12)
    here = mesh.start(job, lay_out(job.parallel, world), rank, world, rank, torch.device("cpu"), "gloo")
    groups = ("copies", "expert", "replicate")
    return [torch.distributed.get_process_group_ranks(here.experts.get_group(name)) for name in groups]


def test_groups_are_neighbours(pool):
    found = pool(meshes, ranks=4)
    assert found[0] == [[0, 2], [0, 1], [0]]
    assert found[3] == [[1, 3], [2, 3], [3]]
