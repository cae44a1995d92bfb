"""Context parallelism: ring and Ulysses attention against the reference, curves of every family against one process."""

import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist

from headway.kernels import random
from headway.kernels.attention.dense import WeightDropout, reference
from headway.kernels.attention.entropy import row_entropy
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.scopes import Window
from headway.kernels.attention.slopes import Slopes, learned
from headway.parallel import mesh
from headway.parallel.context import layout, ring, ulysses
from headway.parallel.context.core import ContextCore
from headway.parallel.context.exchange import Team
from headway.parallel.engines import capabilities
from headway.parallel.planner import traffic as formulas
from headway.pretrain import config
from headway.pretrain.errors import JobError
from headway.pretrain.models.attention import Core
from headway.tests.parallel.family_cases import UNCUT, job_of
from headway.tests.parallel.proof import ROWS, STEPS, Running, prove
from headway.tests.parallel.test_families import evaluates_alike

long = pytest.mark.long


def plain(x):
    """Tensors as arrays, which go from process to process."""
    if x is None:
        return None
    return x.detach().numpy().copy() if isinstance(x, torch.Tensor) else [plain(one) for one in x]


def close(ours, theirs, rtol=1e-11, atol=1e-12):
    """fp64, and sums of some tens of terms in another order."""
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=rtol, atol=atol)


# -- columns ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "ranks"), [(16, 2), (17, 4), (5, 4), (4, 4), (197, 8), (3, 1)])
def test_every_column_is_one_ranks(total, ranks):
    each = [layout.places(total, ranks, rank) for rank in range(ranks)]
    assert sorted(torch.cat(each).tolist()) == list(range(total))
    sizes = [len(places) for places in each]
    assert sizes == [layout.columns(total, ranks, rank) for rank in range(ranks)]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 2
    assert all((places.diff() > 0).all() for places in each)
    assert each[0][0] == 0


def test_ranks_see_as_many_keys_under_a_causal_mask():
    seen = [sum(place + 1 for place in layout.places(64, 4, rank).tolist()) for rank in range(4)]
    assert len(set(seen)) == 1


# -- attention against the reference ---------------------------------------------------------------------------

QUERIES, KEYS = 23, 37
DOCUMENTS = torch.tensor([[0] * 9 + [1] * 11 + [2] * 17, [4] * 37], dtype=torch.int32)
PADDED = torch.tensor([[0] * 30 + [-1] * 7, [0] * 17 + [-1] * 20])
TARGETS = torch.tensor([[0] * 20 + [-1] * 3, [0] * 10 + [1] * 13])
MASKS = {
    "causal": Mask(),
    "full": Mask(False),
    "documents": Mask(True, DOCUMENTS),
    "pairs": Mask(False, DOCUMENTS),
    "padded": Mask(False, PADDED),
    "prefix": Mask(True, prefix=torch.tensor([0, 19])),
    "padded prefix": Mask(True, PADDED, prefix=torch.tensor([37, 7])),
    "window": Mask(scope=Window(4)),
    "window both ways": Mask(False, scope=Window(9)),
    "window of pairs": Mask(False, PADDED, scope=Window(7)),
    "window of a prefix": Mask(True, DOCUMENTS, prefix=torch.tensor([0, 19]), scope=Window(8)),
    "cross": Mask(False),
    "cross padded": Mask(False, TARGETS, PADDED),  # document 1 of the second row has no keys at all
}


def operands(mask, heads, kv_heads, with_bias):
    """q, k, v and the upstream gradient, whole; the bias or None."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    asking = QUERIES if mask.startswith("cross") else KEYS
    q, k, v, up = (
        draw(2, h, s, 10) for h, s in ((heads, asking), (kv_heads, KEYS), (kv_heads, KEYS), (heads, asking))
    )
    if with_bias == "slopes":
        return q, k, v, up, Slopes(draw(heads).abs(), torch.arange(asking), torch.arange(KEYS))
    return q, k, v, up, draw(heads, asking, KEYS) if with_bias else None


def dropout_of(p, length):
    key, slots = torch.tensor(random.key(0, "x")), torch.tensor([7, 3])
    return WeightDropout(p, key, slots, torch.arange(length), first_head=2) if p else None


def attended(rank, world, method, cases, heads=4, kv_heads=2):
    """Case -> output, gradients and (of rows' entropies) values here, with the places of queries and keys."""
    team, found = Team(dist.group.WORLD, world, rank), {}
    for name, with_bias, p in cases:
        *whole, bias = operands(name, heads, kv_heads, with_bias)
        lengths = whole[0].shape[2], KEYS
        asking, asked = (layout.places(n, world, rank) for n in lengths)
        places = asking, asked, asked, asking
        q, k, v, up = (x[:, :, at].clone().requires_grad_() for x, at in zip(whole, places, strict=True))
        if isinstance(bias, Slopes):
            bias = bias._replace(queries=asking)
        elif bias is not None:
            bias = bias[:, asking].clone().requires_grad_()
        mask, dropout = MASKS[name]._replace(split=lengths), dropout_of(p, lengths[0])
        if dropout is not None:
            dropout = dropout._replace(positions=asking)
        attention = config.Attention(scale=0.4)
        core = ContextCore(Core(attention, "dense"), team, method)
        out = core(q, k, v, mask, dropout, bias)
        leaves = [q, k, v] if learned(bias) is None else [q, k, v, bias]
        gradients = torch.autograd.grad(out, leaves, up)
        entropy = slopes = None
        if lengths[0] == KEYS:
            entropy = core.entropy(q, k, mask, bias)
            weighted = (entropy * torch.tensor([1.0, 3.0])).sum() / world  # as in a loss: a share each
            slopes = torch.autograd.grad(weighted, [x for x in leaves if x is not v])
        found[name, with_bias, p] = [plain(x) for x in (out, gradients, entropy, slopes)]
    return found


CASES_OF_CORES = [(name, bias, p) for name in MASKS for bias in (False, True) for p in (0.0, 0.25)]
CASES_OF_CORES += [
    (name, "slopes", 0.25) for name in ("causal", "pairs", "padded prefix", "window both ways")
]


@pytest.mark.parametrize(("method", "ranks", "kv_heads"), [
    ("ring", 2, 2), ("ulysses", 2, 1),
    pytest.param("ring", 3, 1, marks=long), pytest.param("ring", 4, 4, marks=long),
    pytest.param("ulysses", 4, 2, marks=long),
])  # fmt: skip
def test_attention_of_columns_is_the_reference(pool, method, ranks, kv_heads):
    each = pool(attended, ranks=ranks, method=method, cases=CASES_OF_CORES, kv_heads=kv_heads)
    for name, with_bias, p in CASES_OF_CORES:
        q, k, v, up, bias = operands(name, 4, kv_heads, with_bias)
        leaves = [x.requires_grad_() for x in ([q, k, v] if learned(bias) is None else [q, k, v, bias])]
        out = reference(q, k, v, MASKS[name], dropout_of(p, q.shape[2]), 0.4, bias)
        gradients = torch.autograd.grad(out, leaves, up)
        entropy = row_entropy(q, k, MASKS[name], 0.4, bias)
        slopes = torch.autograd.grad(
            (entropy * torch.tensor([1.0, 3.0])).sum(), [x for x in leaves if x is not v]
        )
        for rank, found in enumerate(each):
            asking, asked = (layout.places(n, ranks, rank) for n in (q.shape[2], KEYS))
            ours = found[name, with_bias, p]
            of = {0: asking, 1: asked, 2: asked}
            cut = [g[:, :, of[i]] if i < 3 else g[:, asking] for i, g in enumerate(gradients)]
            close([ours[0], *ours[1]], [out[:, :, asking], *cut])
            if ours[2] is not None:
                cut = [
                    g[:, :, asking] if g.dim() == 4 else g[:, asking] for g in slopes
                ]  # as many keys as queries
                close([ours[2], *ours[3]], [entropy, *cut])


def test_keys_travel_to_those_who_see_them_only():
    team = Team(None, 4, 1)

    def stops(mask, split=(64, 64)):
        return ring.Task(team, mask._replace(split=split), None, 1.0).stops()

    assert stops(Mask()) == stops(Mask(False)) == stops(Mask(scope=Window(64))) == [0, 1, 2, 3]
    # Neighbours on both sides: chunks come twice, in opposite orders.
    assert stops(Mask(scope=Window(9))) == stops(Mask(False, scope=Window(9))) == [0, 1, 3]
    assert stops(Mask(scope=Window(1))) == [0]


def test_chunks_that_nobody_sees_are_not_computed():
    for rank in range(4):
        task = ring.Task(Team(None, 4, rank), Mask(split=(64, 64)), None, 1.0)
        parts = [len(list(task.parts(source))) for source in range(4)]
        assert parts == [3 if source == rank else 2 for source in range(4)]  # of 4: half, and the diagonal
        assert not any(p.mask.causal for source in {0, 1, 2, 3} - {rank} for p in task.parts(source))


def local_window(rank, world):
    """Output and gradients where some ranks are passed by."""
    team = Team(dist.group.WORLD, world, rank)
    places = layout.places(64, world, rank)
    q, k, v, up = (x[:, :, places].clone().requires_grad_() for x in windowed())
    with patch.object(ring, "_pass_on", side_effect=ring._pass_on) as passed:
        out = ring.attention(q, k, v, Mask(split=(64, 64), scope=Window(9)), None, None, None, team)
        gradients = torch.autograd.grad(out, [q, k, v], up)
    return plain(out), plain(gradients), sum(call.args[0].nbytes for call in passed.call_args_list)


def windowed():
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(1, 2, 64, 6, generator=generator, dtype=torch.float64) for _ in range(4)]


def test_a_window_is_exchanged_with_neighbours(pool):
    """Chunks of 8 see themselves and the chunk before; keys and values of a rank are 2 x 2 heads x 16 x 6 numbers."""
    q, k, v, up = windowed()
    for x in (q, k, v):
        x.requires_grad_()
    place = torch.arange(64)
    seen = (place[:, None] >= place) & (place[:, None] - place < 9)
    out = ((q @ k.mT / math.sqrt(6)).masked_fill(~seen, -math.inf)).softmax(-1) @ v
    gradients = torch.autograd.grad(out, [q, k, v], up)
    for rank, (ours, slopes, moved) in enumerate(pool(local_window, ranks=4)):
        at = layout.places(64, 4, rank)
        close([ours, *slopes], [x[:, :, at] for x in (out, *gradients)])
        assert moved == formulas.ring(2 * 2 * 16 * 6 * 8, 4, stops=3)[0].bytes


def test_few_key_heads_are_repeated_for_their_ranks():
    kv = torch.arange(2.0).view(1, 2, 1, 1)
    assert ulysses.repeated(kv, 4).flatten().tolist() == [0, 0, 1, 1]
    assert ulysses.repeated(kv, 2) is kv
    assert ulysses.repeated(torch.zeros(1, 2, 1, 1), 3).shape[1] == 6


# -- curves ----------------------------------------------------------------------------------------------------

RINGS = [name for name in UNCUT if name not in ("content", "composed", "linear", "mobile")]
"""What passes keys around: other mechanisms than dense and window attention trade columns for heads instead."""
OTHERS = [name for name in RINGS if name not in ("t5", "experts", "deit", "mae")]


HEADS = {"model": {"heads": 4}, "objective": {"mae": {"heads": 4}}}
"""Heads that four ranks can share."""
RING, ULYSSES = {"context": 2}, {"context": 2, "context_method": "ulysses"}
FOUR, EIGHT = {"context": 4}, {"context": 2, "shard": 2, "replicate": 2}


@pytest.mark.parametrize(("parallel", "names"), [
    pytest.param(RING, ["t5", "experts", "deit"], id="ring"),
    pytest.param(RING, OTHERS, id="ring of the others", marks=long),
    *(pytest.param(FOUR, [name], id=f"ring of four, {name}", marks=long) for name in RINGS),
    pytest.param(RING | {"shard": 2, "micro_batch": 3}, RINGS, id="with shards", marks=long),
    pytest.param(RING | {"replicate": 2, "shard": 1}, ["bert", "spectral", "mae"], id="with replicas", marks=long),
    pytest.param(EIGHT | {"micro_batch": 1}, ["albert", "dropless", "vit"], id="with both", marks=long),
])  # fmt: skip
def test_rings_draw_the_curves_of_one_process(pool, parallel, names):
    prove(pool, names, parallel)


@pytest.mark.parametrize(("parallel", "names"), [
    pytest.param(ULYSSES, ["mae", "deit", "content", "composed", "linear"], id="ulysses"),
    pytest.param(ULYSSES, [*OTHERS, "t5", "experts"], id="ulysses of the others", marks=long),
    *(pytest.param(ULYSSES | FOUR, [name], id=f"ulysses of four, {name}", marks=long) for name in UNCUT),
    pytest.param(ULYSSES | {"shard": 2, "micro_batch": 2}, ["t5", "experts", "spectral"], id="with shards",
                 marks=long),
    pytest.param(ULYSSES | {"replicate": 2, "shard": 1}, ["roberta", "vit"], id="with replicas", marks=long),
])  # fmt: skip
def test_ulysses_draws_the_curves_of_one_process(pool, parallel, names):
    prove(pool, names, parallel, HEADS)


@pytest.mark.parametrize(("parallel", "name"), [
    (FOUR, "gpt"),
    pytest.param(RING | {"shard": 2}, "t5", marks=long),
    pytest.param(ULYSSES, "bert", marks=long),
    pytest.param({"tensor": 2, "shard": 1}, "t5", marks=long),
    pytest.param({"pipeline": 2, "shard": 1, "micro_batch": 3}, "vit", marks=long),
])  # fmt: skip
def test_windows_draw_the_curves_of_one_process(pool, parallel, name):
    prove(pool, [name], parallel, {"model": {"heads": 4, "attention": {"mechanism": "window", "window": 3}}})


@pytest.mark.parametrize(("parallel", "name"), [
    (RING, "gpt"),
    (ULYSSES | {"tensor": 2, "shard": 1}, "bert"),
    pytest.param(ULYSSES, "gpt", marks=long),
    pytest.param({"tensor": 2, "shard": 2}, "gpt", marks=long),
    pytest.param({"pipeline": 2, "shard": 1, "micro_batch": 3}, "gpt", marks=long),
])  # fmt: skip
def test_slopes_draw_the_curves_of_one_process(pool, parallel, name):
    prove(pool, [name], parallel, {"model": {"heads": 4, "positions": "alibi"}})


@pytest.mark.long
def test_evaluation_is_that_of_one_process(pool):
    evaluates_alike(pool, RING, ["vit", "albert", "mae", "dropless", "spectral", "ul2"])


# -- what whole sequences are still for ------------------------------------------------------------------------


def looked_at(rank, world, parallel, names):
    """Attention maps, logits or images of whole rows after a step, and initial weights by LSUV."""
    from headway.pretrain.objectives.mae import MaskedAutoencoder

    found = {}
    for name in names:
        running = Running(name, rank, world, parallel)
        batch = running.objective.collate(
            running.stream.batch(0, ROWS, running.here.data_rank, running.here.layout.data)
        )
        running.engine.scale_weights(batch)
        running.step(0)
        seen = [running.objective.attention_maps({k: v[:2] for k, v in batch.items()})]
        if isinstance(running.objective, MaskedAutoencoder):
            seen += [x.nan_to_num() for x in running.objective.reconstruct(batch)]
        elif name == "vit":
            seen.append(running.objective.logits(batch["pixels"]))
        elif "targets" not in batch:
            seen.append(running.objective.logits(batch["tokens"]))
        found[name] = plain(seen), running.whole()
    return found


@pytest.mark.parametrize("names", [["mae"], pytest.param(["bert", "experts", "t5"], marks=long)])
def test_reports_read_whole_rows_and_lsuv_all_columns(pool, names):
    expected = looked_at(0, 1, {}, names)
    for found in pool(looked_at, ranks=2, parallel=RING, names=names):
        for name in names:
            for a, b in zip(found[name][0], expected[name][0], strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
            for key, value in expected[name][1].items():
                assert found[name][1][key] == pytest.approx(value, rel=1e-8, abs=1e-10), (name, key)


# -- refusals --------------------------------------------------------------------------------------------------


def refused(name, parallel, context, **model):
    job = job_of(name, parallel, STEPS, ROWS, {"model": model})
    with pytest.raises(JobError) as raised:
        capabilities.check(job, mesh.Layout(context=context), "cpu")
    return str(raised.value)


def test_what_cannot_be_split_is_refused_with_the_nearest_choice():
    text = refused("bert", ULYSSES, 2)
    assert "parallel.context_method = 'ulysses'" in text
    assert "must divide model.heads = 3" in text
    assert "ring" in text
    assert "or parallel.context = 3" in refused("bert", ULYSSES | {"context": 6}, 6)
    assert "objective.mae.heads = 2" in refused("mae", ULYSSES | {"context": 3}, 3)
    assert "sequence of 16 columns" in refused("bert", {"context": 32}, 32)
    assert "objective.mae.rate gives a sequence of 5 columns" in refused("mae", {"context": 8}, 8)
    assert "ring attention computes by row blocks" in refused(
        "dropless", RING, 2, attention={"kernel": "sdpa"}
    )
    assert "model.init.lsuv = True" in refused("vit", RING, 2, init={"scheme": "vit", "lsuv": True})
