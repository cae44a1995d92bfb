"""Silent divergence: a flipped bit is found with one collective, and the rank and the tensor are named."""

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from headway.parallel.mesh import Layout
from headway.parallel.watch import divergence
from headway.parallel.watch.counting import Traffic
from headway.parallel.watch.divergence import CHUNK, KINDS, fingerprint, minority
from headway.parallel.watch.ranks import places, varying
from headway.pretrain.errors import DivergenceError, HeadwayError
from headway.pretrain.optim.sharded import local
from headway.tests.parallel.proof import Running

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool]


def flip(tensor, place, bit):
    """Flip one bit of an element of a contiguous tensor, in place."""
    raw = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    unsigned = raw.view(f"u{tensor.element_size()}")
    unsigned[place] ^= np.array(1 << bit, dtype=unsigned.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_flipped_bit_changes_the_fingerprint(dtype):
    tensor = torch.randn(3, 7).to(dtype)
    known = {int(fingerprint(tensor))}
    bits = 1 if dtype == torch.bool else 8 * tensor.element_size()
    for place in range(tensor.numel()):
        for bit in range(bits):
            flip(tensor, place, bit)
            known.add(int(fingerprint(tensor)))
            flip(tensor, place, bit)
    assert len(known) == 1 + bits * tensor.numel()


def test_a_fingerprint_sees_places_and_signs_and_not_values():
    x = torch.arange(10.0)
    assert int(fingerprint(x)) == int(fingerprint(x.clone())) == int(fingerprint(x.view(2, 5)))
    assert int(fingerprint(x)) != int(fingerprint(x.flip(0)))
    zeros = torch.zeros(4)
    negative = torch.tensor([0.0, -0.0, 0.0, 0.0])
    assert torch.equal(zeros, negative)
    assert int(fingerprint(zeros)) != int(fingerprint(negative))
    assert int(fingerprint(torch.empty(0))) == 0
    assert int(fingerprint(torch.full((3,), float("nan")))) == int(
        fingerprint(torch.full((3,), float("nan")))
    )


def test_large_tensors_are_folded_in_pieces():
    x = torch.zeros(2 * CHUNK + 5)
    alone = int(fingerprint(x))
    seen = set()
    for place in (0, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 4):
        x[place] = 1.0
        seen.add(int(fingerprint(x)))
        x[place] = 0.0
    assert len(seen) == 6
    assert alone == 0 not in seen


@pytest.mark.parametrize(
    ("values", "others"),
    [
        ([1, 1, 1], []),
        ([1, 2, 1], [1]),
        ([1, 2], [0, 1]),
        ([1, 1, 2, 2], [0, 1, 2, 3]),
        ([3, 3, 3, 1, 2], [3, 4]),
    ],
)
def test_who_differs_from_most(values, others):
    assert minority(dict(enumerate(values))) == others


def test_places_of_ranks_and_axes_of_groups():
    layout = Layout(pipeline=2, shard=2, tensor=2)
    assert places(layout)[5] == (1, 0, 0, 0, 1)
    assert varying(layout, [0, 1]) == ("tensor",)
    assert varying(layout, [1, 3, 5, 7]) == ("pipeline", "shard")
    assert varying(layout, [4]) == ()


def wound(running, rank, kind):
    """Flip a bit of a tensor of this kind on this rank; its name."""
    tensors = running.engine.state().tensors
    # `numel`: a rank may hold nothing of a small tensor
    name = next(n for n, t in tensors.items() if kind in n and t.dim() and local(t).numel())
    if running.here.rank == rank:
        flip(local(tensors[name]), local(tensors[name]).numel() - 1, 3)
    return name


def checked(rank, world, name, parallel, at, kind):
    """Three steps with a check after each; a bit is flipped before the last. What was said and what it cost."""
    running = Running(name, rank, world, parallel | {"check_every": 1})
    running.step(0)
    running.step(1)
    tensors = running.engine.state().tensors
    with Traffic(running.here) as traffic:
        divergence.check(tensors, running.here, 2, 1)
    moved = [(m.kind, m.bytes) for m in traffic.moves]
    named = wound(running, at, kind) if kind else ""
    try:
        running.step(2)
        said = ""
    except DivergenceError as error:
        said = str(error)
    return said, named, moved


MATRIX = pytest.mark.long
CLEAN = [
    (2, {"replicate": 2, "shard": 1}, ["spectral", "t5"]),
    pytest.param(2, {"replicate": 2, "shard": 1}, ["roberta", "mae", "bert"], marks=MATRIX),
    pytest.param(2, {"shard": 2}, ["spectral", "t5", "mae", "experts", "bert"], marks=MATRIX),
    pytest.param(3, {"replicate": 3, "shard": 1}, ["vit"], marks=MATRIX),
    pytest.param(4, {"replicate": 4, "shard": 1}, ["albert"], marks=MATRIX),
    pytest.param(4, {"replicate": 2, "shard": 2}, ["spectral", "t5", "mae"], marks=MATRIX),
]


@pytest.mark.parametrize(("ranks", "parallel", "names"), CLEAN)
def test_clean_runs_stay_clean_and_a_check_is_one_small_collective(pool, ranks, parallel, names):
    for name in names:
        for said, _, moved in pool(checked, ranks=ranks, name=name, parallel=parallel, at=None, kind=None):
            assert said == "", name
            assert moved == [("all_gather", ranks * (1 + KINDS) * 3 * 8)]


WOUNDS = [
    (2, {"replicate": 2, "shard": 1}, 1, "mlp.down.weight", None),
    (3, {"replicate": 3, "shard": 1}, 2, "attention.q.weight", [2]),
    pytest.param(
        4,
        {"replicate": 4, "shard": 1},
        0,
        "optimizer.model.blocks.0.attention.q.weight.exp_avg_sq",
        [0],
        marks=MATRIX,
    ),
    pytest.param(4, {"replicate": 4, "shard": 1}, 3, "balance_bias", [3], marks=MATRIX),
    pytest.param(3, {"replicate": 3, "shard": 1}, 1, "ema.model.blocks.1.attention", [1], marks=MATRIX),
    (4, {"replicate": 2, "shard": 2}, 3, "model.blocks.0.attention.q.weight", None),
    pytest.param(3, {"shard": 3}, 2, "balance_bias", [2], marks=MATRIX),
]


@pytest.mark.parametrize(("ranks", "parallel", "at", "kind", "others"), WOUNDS)
def test_a_flipped_bit_is_found(pool, ranks, parallel, at, kind, others):
    """A moment or an average keeps its flipped bit in the step; a parameter and what follows from it differ too."""
    answers = pool(checked, ranks=ranks, name="spectral", parallel=parallel, at=at, kind=kind)
    said = {text for text, _, _ in answers}
    assert len(said) == 1  # all ranks say the same
    (text,) = said
    assert "step 3: replicas have drifted apart" in text
    assert "after step 2, found them equal: remove checkpoints of steps 3 to 3" in text
    if others:
        assert f"rank {others[0]} differs from most of ranks" in text
    else:
        assert "there is no majority" in text


def planted(rank, world, parallel, at, kind):
    """A check right after a bit was flipped: only that tensor differs."""
    running = Running("spectral", rank, world, parallel)
    running.step(0)
    named = wound(running, at, kind)
    with pytest.raises(DivergenceError) as error:
        divergence.check(running.engine.state().tensors, running.here, 1, 5)
    tensor = running.engine.state().tensors[named]
    return str(error.value), named, isinstance(tensor, DTensor)


PLANTED = [
    (3, {"replicate": 3, "shard": 1}, "attention.v.weight", "rank 2 differs from most of ranks 0, 1, 2"),
    (3, {"shard": 3}, "balance_bias", "rank 2 differs from most of ranks 0, 1, 2"),
    (
        4,
        {"replicate": 2, "shard": 2},
        "exp_avg_sq",
        "ranks 0, 2 should hold the same bits, and there is no majority",
    ),
]


@pytest.mark.parametrize(("ranks", "parallel", "kind", "words"), PLANTED)
def test_the_tensor_is_named(pool, ranks, parallel, kind, words):
    for text, named, _ in pool(planted, ranks=ranks, parallel=parallel, at=2, kind=kind):
        assert f"{words}: {named}, on rank" in text
        assert "There was no check before: remove checkpoints" in text


def crowded(rank, world, parallel, at):
    """As `planted`, with fewer sets in the first collective than there are, and what a clean check moved."""
    divergence.KINDS = 1
    try:
        running = Running("spectral", rank, world, parallel)
        running.step(0)
        tensors = running.engine.state().tensors
        sets = len(divergence.grouped(tensors, running.here))
        with Traffic(running.here) as traffic:
            divergence.check(tensors, running.here, 1, 5)
        moved = [(m.kind, m.bytes) for m in traffic.moves]
        said = []
        for kind in ("balance_bias", "exp_avg_sq"):  # sets of four ranks and of two
            named = wound(running, at, kind)
            with pytest.raises(DivergenceError) as error:
                divergence.check(tensors, running.here, 1, 5)
            said.append((str(error.value), named))
            wound(running, at, kind)
        return sets, moved, said
    finally:
        divergence.KINDS = KINDS


def test_sets_that_do_not_fit_one_collective_are_told_in_a_second(pool):
    for sets, moved, said in pool(crowded, ranks=4, parallel={"replicate": 2, "shard": 2}, at=2):
        assert sets == 2
        assert moved == [("all_gather", 4 * 2 * 3 * 8), ("all_gather", 4 * 1 * 3 * 8)]
        for text, named in said:
            assert f"{named}, on rank" in text


def test_one_process_has_nothing_to_compare():
    running = Running("spectral", 0, 1, {"check_every": 1})
    running.step(0)


def test_the_error_is_a_fault_that_the_log_names():
    assert issubclass(DivergenceError, HeadwayError)
    assert DivergenceError.exit_code == 70
