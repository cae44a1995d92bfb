"""Attention to keys and blocks that queries choose: against fla, and against loops over queries in fp64.

Shapes: B batch, H query heads, K key/value heads, S tokens, D head dimension, N chosen.
"""

import math

import pytest
import torch

from headway.kernels import random
from headway.kernels.attention import dense
from headway.kernels.attention.content import moba, nsa, routing, topk
from headway.kernels.attention.content.select import attend, strongest
from headway.kernels.attention.dense import WeightDropout
from headway.kernels.attention.masks import Mask
from headway.tests import oracles
from headway.tests.chosen import first
from headway.tests.kernels.attention.held import held_by

B, H, K, S, D = 2, 4, 2, 77, 6
DOCUMENTS = torch.tensor([[0] * 21 + [1] * 3 + [2] * 53, [5] * 60 + [-1] * 17])
MASKS = {
    "causal": Mask(),
    "full": Mask(False),
    "documents": Mask(True, DOCUMENTS),
    "pairs": Mask(False, DOCUMENTS),
    "prefix": Mask(True, DOCUMENTS, prefix=torch.tensor([30, 9])),
}
SETTINGS = {
    "topk": (topk, {"selected": 5}, MASKS),
    "moba": (moba, {"block": 8, "selected": 3}, ("causal", "documents")),
    "nsa": (nsa, {"block": 8, "selected": 4, "window": 11}, ("causal", "documents")),
    "routing": (routing, {"clusters": 3, "window": 4}, ("causal", "full", "documents", "pairs")),
}
CASES = [(name, mask) for name, (_, _, masks) in SETTINGS.items() for mask in masks]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def heads(length=S, queries=H, keys=K, dim=D, dtype=torch.float64):
    shapes = ((queries, length), (keys, length), (keys, length))
    return [draw(B, h, n, dim, seed=i, dtype=dtype) for i, (h, n) in enumerate(shapes)]


def learned(name, length=S, queries=H, keys=K, dim=D):
    """What a mechanism owns, and its gates."""
    if name == "routing":
        return {"centroids": draw(queries, 3, dim, seed=4)}
    if name != "nsa":
        return {}
    block = SETTINGS["nsa"][1]["block"]
    shapes = {"positions": (keys, block, dim), "up": (keys, dim, dim), "down": (keys, dim, dim)}
    found = {f"{what}_{n}": draw(*s, seed=5) for what in ("key", "value") for n, s in shapes.items()}
    return found | {"gate": draw(B, queries, length, 3, seed=6)}


def value_and_gradients(compute, inputs, own, settings, mask, dropout=None):
    out = compute(*inputs, mask, dropout, None, None, **settings, **own)
    up = draw(*out.shape, seed=9).detach().to(out.dtype)
    return out, *torch.autograd.grad(out, [*inputs, *own.values()], up)


@pytest.mark.parametrize(("name", "mask"), CASES)
def test_gathering_is_masking(name, mask):
    module, settings, _ = SETTINGS[name]
    for length in (S, 5):
        here = MASKS[mask]
        if here.documents is not None:
            here = here._replace(documents=here.documents[:, :length])
        inputs, own = heads(length), learned(name, length)
        ours, theirs = (
            value_and_gradients(f, inputs, own, settings, here) for f in (module.attention, module.reference)
        )
        # fp64: sums of some hundred products of order ten.
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("name", "mask"), [c for c in CASES if c[1] in ("documents", "pairs")])
def test_documents_do_not_meet(name, mask):
    """Wherever they begin: they do not at block boundaries here. Choices too depend on a query's document alone."""
    module, settings, _ = SETTINGS[name]
    inputs, own = heads(), learned(name)
    out = module.attention(*inputs, MASKS[mask], None, None, None, **settings, **own)
    others = [x.detach().clone() for x in inputs]
    for x in others:
        x[0, :, :21] = 7 * torch.randn_like(x[0, :, :21])
        x[0, :, 24:] = 7 * torch.randn_like(x[0, :, 24:])
    changed = module.attention(*others, MASKS[mask], None, None, None, **settings, **own)
    assert torch.equal(changed[0, :, 21:24], out[0, :, 21:24])
    for slope in torch.autograd.grad(out[0, :, 21:24].square().sum(), inputs):
        assert not slope[0, :, :21].any()
        assert not slope[0, :, 24:].any()


def test_the_strongest_are_found_in_order():
    scores = torch.tensor([[3.0, 1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    seen = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 1], [0, 0, 0, 1, 0]]).bool()
    assert strongest(scores, seen, 2).tolist() == [[0, 2], [0, 2], [3, -1]]
    assert strongest(scores, seen, 4).tolist()[0] == [0, 2, 3, 4]
    assert strongest(scores, seen, 7).tolist()[1] == [0, 2, 3, 4, -1, -1, -1]
    draws = torch.randint(0, 6, (50, 23)).double()
    allowed = torch.rand(50, 23) < 0.6
    for row, may, got in zip(draws.tolist(), allowed.tolist(), strongest(draws, allowed, 5), strict=True):
        order = sorted((i for i in range(23) if may[i]), key=lambda i: (-row[i], i))
        assert [i for i in got.tolist() if i >= 0] == sorted(order[:5])


def test_attention_to_blocks_has_the_gradients_of_finite_differences():
    q, k, v = (draw(1, h, 7, 2, seed=h) for h in (2, 1, 1))
    index = torch.tensor([0, -1, 0, 1, 1, 0, 2, -1, 0, 2, 1, 2, 0, 1]).view(1, 1, 7, 2)
    kept = torch.rand(1, 1, 7, 2) < 0.8
    mask = Mask(True, torch.tensor([[0, 0, 0, 0, 1, 1, 1]]))
    assert torch.autograd.gradcheck(
        lambda q, k, v: attend(q, k, v, index, mask, 0.7, 3, kept), (q, k, v), atol=1e-7
    )


# -- the references --------------------------------------------------------------------------------------------


def softmax_over(q, k, v, kept):
    """Output of one query [D] over some keys."""
    return torch.softmax(k[kept] @ q / math.sqrt(len(q)), 0) @ v[kept]


def test_topk_is_a_softmax_over_the_largest():
    q, k, v = heads()
    out = topk.reference(q, k, v, MASKS["documents"], selected=5)
    for b, h, i in [(0, 0, 0), (0, 3, 22), (0, 1, 76), (1, 2, 40), (1, 0, 70)]:
        seen = [j for j in range(i + 1) if DOCUMENTS[b, j] == DOCUMENTS[b, i]]
        best = sorted(seen, key=lambda j: -float((k[b, h // 2, j] @ q[b, h, i]).detach()))[:5]
        torch.testing.assert_close(out[b, h, i], softmax_over(q[b, h, i], k[b, h // 2], v[b, h // 2], best))
    everything = topk.attention(q, k, v, MASKS["pairs"], selected=S)
    torch.testing.assert_close(everything, dense.reference(q, k, v, MASKS["pairs"]))


def test_of_equal_scores_the_first_are_kept():
    q, k, v = heads()
    with torch.no_grad():
        k[:, :, 1::2] = k[:, :, :-1:2][:, :, : k[:, :, 1::2].shape[2]]
    pairs = [
        value_and_gradients(f, [q, k, v], {}, {"selected": 3}, Mask())
        for f in (topk.attention, topk.reference)
    ]
    torch.testing.assert_close(*pairs, rtol=1e-11, atol=1e-11)
    assert not pairs[0][2][:, :, 3].equal(pairs[0][2][:, :, 2])


def test_dropout_of_chosen_weights_is_that_of_their_places():
    drop = WeightDropout(0.3, torch.tensor(random.key(0, "x")), torch.tensor([7, 3]), torch.arange(S), 2)
    for mask in ("causal", "pairs"):
        ours, theirs = (
            value_and_gradients(f, heads(), {}, {"selected": 5}, MASKS[mask], drop)
            for f in (topk.attention, topk.reference)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_topk_looks_across():
    q, (_, k, v) = draw(B, H, 9, D, seed=3), heads()
    mask = Mask(False, torch.tensor([[0] * 9, [5] * 4 + [3] * 5]), DOCUMENTS)
    ours, theirs = (
        value_and_gradients(f, [q, k, v], {}, {"selected": 5}, mask) for f in (topk.attention, topk.reference)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    assert (ours[0][1, :, 4:] == 0).all()  # no key of document 3
    assert all(g.isfinite().all() for g in ours)


def flash_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, **_):
    """flash-attn's packed forward in torch: output [T, H, D] and log-sum-exp [H, T]."""
    scores = _packed(q, k, cu_seqlens_q, cu_seqlens_k, causal) * softmax_scale
    return (torch.softmax(scores, -1) @ v.transpose(0, 1)).transpose(0, 1), scores.logsumexp(-1), None, None


def flash_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, **_
):
    """Its backward, by the log-sum-exp that it is given."""
    scores = _packed(q, k, cu_seqlens_q, cu_seqlens_k, causal) * softmax_scale
    weights = torch.exp(scores - softmax_lse[..., None])
    delta = (dout * out).sum(-1).T
    d_scores = weights * (torch.einsum("qhd,khd->hqk", dout, v) - delta[..., None]) * softmax_scale
    dq.copy_(torch.einsum("hqk,khd->qhd", d_scores, k))
    dk.copy_(torch.einsum("hqk,qhd->khd", d_scores, q))
    dv.copy_(torch.einsum("hqk,qhd->khd", weights, dout))


def _packed(q, k, starts_q, starts_k, causal):
    row, column = (
        torch.bucketize(torch.arange(len(x)), s.long(), right=True) for x, s in ((q, starts_q), (k, starts_k))
    )
    hidden = row[:, None] != column
    if causal:
        hidden |= torch.arange(len(q))[:, None] < torch.arange(len(k))
    return torch.einsum("qhd,khd->hqk", q, k).masked_fill(hidden, -math.inf)


def _chunks(starts, size):
    """How many chunks each document has."""
    return -(-starts.diff() // size)


CHUNKS = {
    "prepare_lens": lambda starts: starts.diff(),
    "prepare_chunk_offsets": lambda starts, size: torch.nn.functional.pad(
        _chunks(starts, size), (1, 0)
    ).cumsum(0),
    "prepare_cu_seqlens_from_lens": lambda lengths: torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
    "prepare_chunk_indices": lambda starts, size: torch.tensor(
        [(i, j) for i, count in enumerate(_chunks(starts, size)) for j in range(count)]
    ),
    "prepare_split_cu_seqlens": lambda split_size, cu_seqlens, dtype, device: torch.tensor(
        [0]
        + [
            min(a + split_size, b)
            for s, b in cu_seqlens.unfold(0, 2, 1).tolist()
            for a in range(s, b, split_size)
        ]
    ),
}
"""fla's bookkeeping, whose file wants Triton."""


@pytest.mark.parametrize("selected", [2, 3, 9])
@pytest.mark.filterwarnings("ignore:index_reduce")
def test_moba_is_flas(selected, monkeypatch):
    theirs = oracles.file(
        "fla/ops/moba/parallel.py", ("fla", "fla.ops", "fla.ops.utils", "fla.ops.utils.index")
    )
    for name, function in CHUNKS.items():
        monkeypatch.setattr(theirs, name, function)
    monkeypatch.setattr(theirs, "flash_attn_varlen_func", object())
    monkeypatch.setattr(theirs, "_flash_attn_varlen_forward", flash_forward)
    monkeypatch.setattr(theirs, "_flash_attn_varlen_backward", flash_backward)
    lengths = [37, 8, 50]  # each alone, as fla counts a document's chunks from its beginning
    q, k, v = (draw(1, 3, sum(lengths), D, seed=i, dtype=torch.float32) for i in range(3))
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    want = theirs.parallel_moba(*packed, starts, 50, 8, selected).transpose(1, 2)
    pieces = zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True)
    got = torch.cat([moba.attention(*p, Mask(), block=8, selected=selected) for p in pieces], 2)
    up = draw(*got.shape, seed=9, dtype=torch.float32).detach()
    # fp32 on both sides: roundings of 6e-8 in sums of up to 72 terms of order ten.
    for ours, other in zip(
        (got, *torch.autograd.grad(got, [q, k, v], up)),
        (want, *torch.autograd.grad(want, [q, k, v], up)),
        strict=True,
    ):
        torch.testing.assert_close(ours, other, rtol=2e-5, atol=2e-5)


def test_nsa_is_flas(monkeypatch):
    absent = ("fla", "fla.ops", "fla.ops.utils", "fla.ops.utils.pooling")  # Triton's
    theirs, block, selected, length = oracles.file("fla/ops/nsa/naive.py", absent), 8, 4, 64
    monkeypatch.setattr(theirs, "mean_pooling", lambda x, size, _: x.unflatten(1, (-1, size)).mean(2))
    q, k, v = (draw(1, h, length, D, seed=i, dtype=torch.float32) for i, h in enumerate((32, 2, 2)))
    gate = draw(1, 32, length, 3, seed=6, dtype=torch.float32)
    sizes = {"positions": (2, block, D), "up": (2, D, D), "down": (2, D, D)}
    own = {f"{w}_{n}": torch.zeros(s) for w in ("key", "value") for n, s in sizes.items()}
    off = torch.tensor([0.0, 0.0, -torch.inf])  # fla's window wants flash-attn
    got = nsa.attention(q, k, v, Mask(), block=block, selected=selected, window=9, gate=gate + off, **own)
    packed = [x.transpose(1, 2) for x in (q, k, v)]
    gates = gate.sigmoid().transpose(1, 2)
    want = theirs.naive_nsa(
        *packed, gates[..., 0], gates[..., 1], block_counts=selected, block_size=block
    ).transpose(1, 2)
    up = draw(*got.shape, seed=9, dtype=torch.float32).detach()
    leaves = [q, k, v, gate]
    for ours, other in zip(
        (got, *torch.autograd.grad(got, leaves, up)),
        (want, *torch.autograd.grad(want, leaves, up)),
        strict=True,
    ):
        torch.testing.assert_close(ours, other, rtol=2e-5, atol=2e-5)  # fp32, gradients of 16 heads summed


def test_the_window_of_nsa_and_its_summaries():
    q, k, v = heads()
    own = learned("nsa")
    settings = SETTINGS["nsa"][1]
    own["gate"] = torch.full((B, H, S, 3), -torch.inf).index_fill(-1, torch.tensor([2]), torch.inf).double()
    out = nsa.reference(q, k, v, MASKS["documents"], **settings, **own)
    for b, h, i in [(0, 0, 0), (0, 3, 23), (0, 2, 60), (1, 1, 75)]:
        seen = [j for j in range(max(0, i - 10), i + 1) if DOCUMENTS[b, j] == DOCUMENTS[b, i]]
        torch.testing.assert_close(out[b, h, i], softmax_over(q[b, h, i], k[b, h // 2], v[b, h // 2], seen))
    own["gate"] = own["gate"].roll(1, -1)
    out = nsa.reference(q, k, v, MASKS["documents"], **settings, **own)

    def phi(x, what, tokens):
        p, up, down = (own[f"{what}_{n}"][0] for n in ("positions", "up", "down"))
        hidden = torch.stack([torch.nn.functional.gelu((x[j] + p[j % 8]) @ up) for j in tokens])
        return x[tokens].mean(0) + hidden.mean(0) @ down

    for i in (60, 63):  # blocks 3 to 6 or 7 have ended; document 2 begins at 24, the third block's end
        blocks = [list(range(8 * c, 8 * c + 8)) for c in range(3, (i + 1) // 8)]
        keys, values = (
            torch.stack([phi(x[0, 0], what, tokens) for tokens in blocks])
            for x, what in ((k, "key"), (v, "value"))
        )
        torch.testing.assert_close(
            out[0, 1, i], softmax_over(q[0, 1, i], keys, values, list(range(len(blocks))))
        )
    assert (out[0, :, 0:7] == 0).all()  # no block has ended


@pytest.mark.parametrize("causal", [True, False])
def test_routing_is_a_softmax_over_the_last_of_a_cluster(causal):
    q, k, v = heads()
    centroids = learned("routing")["centroids"]
    mask = MASKS["documents" if causal else "pairs"]
    out = routing.reference(q, k, v, mask, clusters=3, window=4, centroids=centroids)

    def normal(x):
        return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()

    for b, h, i in [(0, 0, 0), (0, 3, 22), (0, 1, 70), (1, 2, 40)]:
        logits = torch.stack(
            [
                centroids[h] @ (normal(q[b, h, j]) + normal(k[b, h // 2, j])) / 2 / math.sqrt(D)
                for j in range(S)
            ]
        )
        mine = logits[i].argmax()
        same = [j for j in range(S) if logits[j].argmax() == mine and DOCUMENTS[b, j] == DOCUMENTS[b, i]]
        at = same.index(i)
        seen = same[max(0, at - 3) : at + (1 if causal else 4)]
        scores = torch.stack(
            [
                normal(k[b, h // 2, j]) @ normal(q[b, h, i]) / math.sqrt(D) + logits[j].log_softmax(-1)[mine]
                for j in seen
            ]
        )
        torch.testing.assert_close(out[b, h, i], torch.softmax(scores, 0) @ v[b, h // 2, seen])


@pytest.mark.parametrize("name", first(1, SETTINGS))
def test_what_is_held_grows_with_the_length(name):
    module, settings, _ = SETTINGS[name]

    def output(length):
        inputs, own = heads(length, dtype=torch.float32), learned(name, length)
        own = {key: x.detach().float().requires_grad_() for key, x in own.items()}
        return module.attention(*inputs, Mask(), None, None, None, **settings, **own)

    short, long = (held_by(lambda n=n: output(n)) for n in (512, 2048))
    assert long < 4.2 * short
