"""Attention to what is near and to summaries of what is far: against loops over queries in fp64, and dense attention.

Shapes: B batch, H query heads, K key/value heads, S tokens, D head dimension.
"""

import math
from functools import partial

import pytest
import torch

from headway.kernels import random
from headway.kernels.attention import dense
from headway.kernels.attention.content import hierarchical, logtime, span, strips
from headway.kernels.attention.dense import WeightDropout
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.scopes import Window
from headway.tests.chosen import first
from headway.tests.kernels.attention.content.test_select import (
    DOCUMENTS,
    MASKS,
    D,
    H,
    S,
    draw,
    heads,
    value_and_gradients,
)
from headway.tests.kernels.attention.held import held_by

SETTINGS = {
    "span": (span, {"span": 14, "ramp": 5}),
    "hierarchical": (hierarchical, {"block": 8}),
    "logtime": (logtime, {"block": 4}),
}
WAYS = ("causal", "full", "documents", "pairs")


def learned(name, queries=H):
    return {"reach": draw(queries, seed=4)} if name == "span" else {}


def dropout(p=0.3):
    return WeightDropout(p, torch.tensor(random.key(0, "x")), torch.tensor([7, 3]), torch.arange(S), 2)


@pytest.mark.parametrize("drop", [None, dropout()], ids=["all", "dropout"])
@pytest.mark.parametrize("mask", WAYS)
@pytest.mark.parametrize("name", SETTINGS)
def test_strips_are_the_reference(name, mask, drop):
    module, settings = SETTINGS[name]
    for length in (S, 5):
        here = MASKS[mask]
        if here.documents is not None:
            here = here._replace(documents=here.documents[:, :length])
        less = drop and drop._replace(positions=torch.arange(length))
        ours, theirs = (
            value_and_gradients(f, heads(length), learned(name), settings, here, less)
            for f in (module.attention, module.reference)
        )
        # fp64: sums of some hundred products of order ten.
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mask", ["documents", "pairs"])
@pytest.mark.parametrize("name", SETTINGS)
def test_documents_do_not_meet(name, mask):
    """Wherever they begin: a block that several share is summarised for each of them alone."""
    module, settings = SETTINGS[name]
    compute = partial(module.attention, mask=MASKS[mask], **settings, **learned(name))
    inputs = heads()
    out = compute(*inputs)
    for own in (slice(0, 21), slice(21, 24), slice(24, S)):
        others = [torch.full_like(x, 50.0) for x in inputs]
        for x, mine in zip(others, inputs, strict=True):
            x[0, :, own] = mine[0, :, own]
        assert torch.equal(compute(*others)[0, :, own], out[0, :, own])
        for slope in torch.autograd.grad(out[0, :, own].square().sum(), inputs, retain_graph=True):
            assert slope[0, :, own].any()
            slope[0, :, own] = 0
            assert not slope[0].any()


def test_strips_of_windows_are_windows():
    for mask in WAYS:
        for window in (1, 7, 140):
            near = lambda query, key, w=window: (query - key).abs() < w  # noqa: E731
            strip = strips.within(window, MASKS[mask].causal)
            ours, theirs = (
                value_and_gradients(f, heads(), {}, {}, MASKS[mask])
                for f in (
                    lambda q, k, v, mask, *_, strip=strip, near=near: strips.attention(
                        q, k, v, mask, strip, near
                    ),
                    lambda q, k, v, mask, *_, w=window: dense.reference(
                        q, k, v, mask._replace(scope=Window(w))
                    ),
                )
            )
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


# -- adaptive span ---------------------------------------------------------------------------------------------


def test_span_is_the_papers_equation():
    q, k, v = heads()
    reach = draw(H, seed=4)
    for name in ("documents", "pairs"):
        out = span.reference(q, k, v, MASKS[name], span=14, ramp=5, reach=reach)
        for b, h, i in [(0, 0, 0), (0, 3, 22), (0, 1, 76), (1, 2, 40)]:
            z, top, below = 14 / (1 + math.exp(-float(reach[h].detach()))), 0.0, 0.0
            for j in range(S):
                x = abs(i - j)
                if DOCUMENTS[b, i] != DOCUMENTS[b, j] or x >= 14 or (name == "documents" and j > i):
                    continue
                m = min(max((5 + z - x) / 5, 0.0), 1.0)
                share = m * torch.exp(q[b, h, i] @ k[b, h // 2, j] / math.sqrt(D))
                top, below = top + share * v[b, h // 2, j], below + share
            torch.testing.assert_close(out[b, h, i], top / below)


def test_the_soft_mask_is_fairseqs():
    """`AdaptiveMask.forward` of fairseq 0.12.2, examples/adaptive_span, on the keys from the farthest to the nearest:
    its nearest is the token before the query, at x = 0, where here it is the query's own token."""
    longest, ramp, share = 20, 6, torch.tensor([0.3, 0.75, 1.0])
    template = torch.linspace(1 - longest, 0, steps=longest)
    theirs = ((template + share[:, None] * longest) / ramp + 1).clamp(0, 1)
    distance = torch.arange(longest - 1, -1, -1).float()
    ours = span.soft_mask(distance, share.logit(), longest, ramp)
    torch.testing.assert_close(
        ours, theirs, rtol=0, atol=2e-6
    )  # fp32: distances of 20, a logit and its sigmoid


def test_spans_have_the_gradients_of_finite_differences():
    q, k, v, reach = draw(1, 2, 9, 2), draw(1, 1, 9, 2, seed=1), draw(1, 1, 9, 2, seed=2), draw(2, seed=3)
    for causal in (True, False):
        assert torch.autograd.gradcheck(
            lambda q, k, v, r, c=causal: span.attention(q, k, v, Mask(c), span=5, ramp=3, reach=r),
            (q, k, v, reach),
        )


def test_a_span_shortens_and_lengthens():
    q, k, v = heads()
    short, long = (torch.full((H,), r, dtype=torch.float64) for r in (-30.0, 30.0))
    ours = span.attention(q, k, v, Mask(), span=14, ramp=1, reach=short)
    torch.testing.assert_close(
        ours, v.repeat_interleave(2, 1), rtol=1e-9, atol=1e-9
    )  # itself alone: z is 1e-12
    ours = span.attention(q, k, v, Mask(), span=14, ramp=1, reach=long)
    torch.testing.assert_close(ours, dense.reference(q, k, v, Mask(scope=Window(14))), rtol=1e-9, atol=1e-9)


# -- summaries -------------------------------------------------------------------------------------------------


def by_loops(q, k, v, mask, groups):
    """Output of some queries, each by its own list of groups of places: softmax over means, counted as often as they
    have tokens, of what the query sees."""
    found = {}
    for (b, h, i), listed in groups.items():
        keys, values, counts = [], [], []
        for group in listed:
            mine = [
                j
                for j in group
                if 0 <= j < S and (mask.documents is None or mask.documents[b, j] == mask.documents[b, i])
            ]
            if mine:
                keys.append(k[b, h // 2, mine].mean(0))
                values.append(v[b, h // 2, mine].mean(0))
                counts.append(len(mine))
        scores = torch.stack(keys) @ q[b, h, i] / math.sqrt(D) + torch.tensor(counts).double().log()
        found[b, h, i] = torch.softmax(scores, 0) @ torch.stack(values)
    return found


QUERIES = [(0, 0, 0), (0, 3, 22), (0, 1, 23), (0, 1, 76), (1, 2, 40), (1, 0, 59), (1, 3, 70), (0, 2, 48)]


@pytest.mark.parametrize("mask", WAYS)
def test_two_levels_are_loops(mask):
    q, k, v = heads()
    causal = MASKS[mask].causal
    out = hierarchical.reference(q, k, v, MASKS[mask], block=8)
    groups = {}
    for b, h, i in QUERIES:
        own = i // 8
        near = [[j] for j in range(8 * own, i + 1 if causal else 8 * own + 8)]
        others = [c for c in range(math.ceil(S / 8)) if c < own or (c > own and not causal)]
        groups[b, h, i] = near + [list(range(8 * c, 8 * c + 8)) for c in others]
    for at, want in by_loops(q, k, v, MASKS[mask], groups).items():
        torch.testing.assert_close(out[at], want)


def spans_of(chunk, chunks, causal):
    """Spans (first chunk, past the last) that a chunk reads, by halving what is left until it is near."""
    found = []

    def visit(first, size):
        last = min(first + size, chunks)
        if first >= last or (causal and first >= chunk):
            return
        # At its level a span is near if it is the query's own or touches it: then its halves are looked at.
        if abs(first // size - chunk // size) <= 1:
            if size > 1:
                visit(first, size // 2)
                visit(first + size // 2, size // 2)
        else:
            found.append((first, last))

    visit(0, 1 << chunks.bit_length())
    return found


@pytest.mark.parametrize("mask", WAYS)
def test_logarithmic_reads_are_loops(mask):
    q, k, v = heads()
    causal, chunks = MASKS[mask].causal, math.ceil(S / 4)
    out = logtime.reference(q, k, v, MASKS[mask], block=4)
    groups = {}
    for b, h, i in QUERIES:
        t = i // 4
        near = [[j] for j in range(4 * t - 4, i + 1 if causal else 4 * t + 8)]
        spans = spans_of(t, chunks, causal)
        groups[b, h, i] = near + [list(range(4 * a, 4 * z)) for a, z in spans]
    for at, want in by_loops(q, k, v, MASKS[mask], groups).items():
        torch.testing.assert_close(out[at], want)


@pytest.mark.parametrize("causal", [True, False])
def test_reads_hold_every_token_once_and_are_few(causal):
    for chunks in (*range(1, 40), 64, 100, 129):
        columns = logtime.reads(chunks, causal, torch.device("cpu"))
        assert len(columns) <= (2 if causal else 4) * math.ceil(math.log2(chunks + 1))
        for t in range(chunks):
            near = range(max(0, t - 1), min(chunks, t + (1 if causal else 2)))
            found = [*near]
            for level, past, numbers in columns:
                n = int(numbers[t])
                if n >= 0:
                    span_ = range(n << level, min(chunks, (n + 1) << level))
                    apart = t - span_[-1] if past else span_[0] - t
                    assert apart > 1 << level  # a span is shorter than it is far
                    found += span_
            assert sorted(found) == [*range(t + 1 if causal else chunks)]


@pytest.mark.parametrize("mask", ["causal", "full"])
@pytest.mark.parametrize("name", ["hierarchical", "logtime"])
def test_where_keys_of_a_span_are_equal_it_is_dense_attention(name, mask):
    """One key in all of a row: the weights are dense attention's, whatever the values are."""
    module, settings = SETTINGS[name]
    q, k, v = heads()
    k = k[:, :, :1].expand(-1, -1, S, -1)
    ours = module.attention(q, k, v, MASKS[mask], **settings)
    torch.testing.assert_close(ours, dense.reference(q, k, v, MASKS[mask]), rtol=1e-12, atol=1e-12)
    if name == "hierarchical":  # one in each block is enough
        k = heads()[1][:, :, torch.arange(S) // 8]
        ours = module.attention(q, k, v, MASKS[mask], **settings)
        torch.testing.assert_close(ours, dense.reference(q, k, v, MASKS[mask]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["hierarchical", "logtime"])
def test_summaries_have_the_gradients_of_finite_differences(name):
    module, inputs = (
        SETTINGS[name][0],
        (draw(1, 2, 11, 2), draw(1, 1, 11, 2, seed=1), draw(1, 1, 11, 2, seed=2)),
    )
    documents = torch.tensor([[0] * 3 + [1] * 8])
    for mask in (Mask(True, documents), Mask(False)):
        assert torch.autograd.gradcheck(partial(module.attention, mask=mask, block=2), inputs, fast_mode=True)


@pytest.mark.parametrize("causal", first(1, [True, False]))
@pytest.mark.parametrize("name", first(1, SETTINGS))
def test_what_is_held_grows_with_the_length(name, causal):
    module, settings = SETTINGS[name]
    own = {key: x.detach().float().requires_grad_() for key, x in learned(name).items()}
    wide = {} if name == "span" else {"block": 16}

    def output(length):
        return module.attention(*heads(length, dtype=torch.float32), Mask(causal), **(settings | wide), **own)

    short, long = (held_by(lambda n=n: output(n)) for n in (512, 2048))
    assert long < (4.6 if name == "logtime" else 4.2) * short  # what chunks read: log n / block of the length
