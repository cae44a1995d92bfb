"""Latent attention's two forms against the equation by hand, and dense row blocks with values narrower than keys."""

import math

import pytest
import torch
import torch.nn.functional as F

from headway.kernels import random
from headway.kernels.attention import blocks, dense
from headway.kernels.attention.dense import WeightDropout
from headway.kernels.attention.masks import Mask, lower
from headway.kernels.attention.mixers import latent
from headway.tests.kernels.attention.test_kernels import Largest

DOCUMENTS = torch.tensor([[0] * 40 + [1] * 33 + [2] * 80, [4] * 140 + [-1] * 13])
TARGETS = torch.tensor([[0] * 30 + [-1] * 5, [0] * 20 + [1] * 15])
MASKS = {
    "causal": Mask(),
    "full": Mask(False),
    "documents": Mask(True, DOCUMENTS),
    "pairs": Mask(False, DOCUMENTS),
    "prefix": Mask(True, prefix=torch.tensor([0, 50])),
    "cross": Mask(False),
    "cross padded": Mask(
        False, TARGETS, DOCUMENTS[[1, 0]]
    ),  # documents 1 and -1 of the queries: some have no keys
}
QUERIES = {"cross": 35, "cross padded": 35}
KEYS = 153


def absorbed(q, turned_q, c, turned_k, k_up, v_up, mask, dropout=None, scale=None, bias=None):
    heads = latent.absorbed(q, turned_q, c, turned_k, k_up)
    scale = 1 / math.sqrt(q.shape[-1] + turned_q.shape[-1]) if scale is None else scale
    mean = latent.one_head(*heads, mask, dropout, scale, bias)
    return torch.einsum("bhqc,hdc->bhqd", mean, v_up)


def in_blocks(*given):
    return blocks.attention(*latent.expanded(*given[:6]), *given[6:])


FORMS = {"absorbed": absorbed, "blocks": in_blocks}


def inputs(mask, dtype=torch.float64, bias=False, heads=3, dim=8, rotary=4, rank=6):
    generator = torch.Generator().manual_seed(1)
    rows = QUERIES.get(mask, KEYS)
    shapes = [
        (2, heads, rows, dim),
        (2, heads, rows, rotary),
        (2, KEYS, rank),
        (2, KEYS, rotary),
        (heads, dim, rank),
        (heads, dim, rank),
        *([(heads, rows, KEYS)] if bias else []),
    ]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def value_and_gradients(compute, given, mask, dropout=None, scale=None):
    out = compute(*given[:6], mask, dropout, scale, *given[6:])
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return out, *torch.autograd.grad(out, given, upstream.to(out.dtype))


def test_reference_is_the_equation():
    q, turned_q, c, turned_k, k_up, v_up = given = inputs("causal")
    out = latent.reference(*given, Mask())
    for b, h, i in [(0, 0, 0), (1, 2, 60), (0, 1, 152)]:
        products = torch.stack(
            [q[b, h, i] @ (k_up[h] @ c[b, j]) + turned_q[b, h, i] @ turned_k[b, j] for j in range(i + 1)]
        )
        weights = torch.softmax(products / math.sqrt(8 + 4), 0)
        torch.testing.assert_close(out[b, h, i], sum(w * (v_up[h] @ c[b, j]) for j, w in enumerate(weights)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", FORMS)
def test_forms_match_the_reference(form, mask, bias):
    for scale, dropped in ((None, False), (0.4, True)):
        drop = None
        if dropped:
            places = torch.arange(QUERIES.get(mask, KEYS))
            drop = WeightDropout(0.25, torch.tensor(random.key(0, "x")), torch.tensor([7, 3]), places, 4)
        given = inputs(mask, bias=bias)
        ours, theirs = (
            value_and_gradients(f, given, MASKS[mask], drop, scale) for f in (FORMS[form], latent.reference)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)  # fp64, sums of 153 x 8 terms
    given = inputs(mask, torch.float32, bias)
    ours, theirs = (value_and_gradients(f, given, MASKS[mask]) for f in (FORMS[form], latent.reference))
    # 2^-24 in sums of up to 153 x 8 terms of order 10 (scores are of that order too), in another order.
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_bf16_is_as_good_as_bf16_can_be(form):
    given = [(t * 0.5).detach().requires_grad_() for t in inputs("causal", torch.bfloat16)]
    exact = value_and_gradients(
        latent.reference, [t.detach().double().requires_grad_() for t in given], Mask()
    )
    for got, want in zip(value_and_gradients(FORMS[form], given, Mask()), exact, strict=True):
        # A chain of five roundings (up-projection or absorbed query, scores, weights, mean, output), each of 2^-9.
        assert (got.double() - want).norm() / want.norm() < 5 * 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_blocks_take_values_of_another_width(mask, bias, dtype):
    generator = torch.Generator().manual_seed(3)
    rows = QUERIES.get(mask, KEYS)
    for value_dim in (5, 20):
        shapes = [
            (2, 6, rows, 12),
            (2, 2, KEYS, 12),
            (2, 2, KEYS, value_dim),
            *([(6, rows, KEYS)] if bias else []),
        ]
        given = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
        exact = given_of(given, torch.float64)
        wide = grads(dense.reference, exact, MASKS[mask])
        for got, want in zip(grads(blocks.attention, given_of(given, dtype), MASKS[mask]), wide, strict=True):
            # Relative errors of a chain of scores, weights and output: 2^-24 and 2^-9 each, sums averaging them.
            bound = 1e-5 if dtype == torch.float32 else 3 * 2**-8
            assert (got.double() - want).norm() / want.norm() < bound
        if not bias and MASKS[mask].documents is None and MASKS[mask].prefix is None:
            q, k, v = exact
            theirs = F.scaled_dot_product_attention(q, k, v, is_causal=MASKS[mask].causal, enable_gqa=True)
            torch.testing.assert_close(dense.reference(q, k, v, MASKS[mask]), theirs)


def given_of(given, dtype):
    return [t.to(dtype).detach().requires_grad_() for t in given]


def grads(compute, given, mask):
    out = compute(*given[:3], mask, None, None, *given[3:])
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return out, *torch.autograd.grad(out, given, upstream.to(out.dtype))


@pytest.mark.parametrize("form", FORMS)
def test_a_query_that_sees_nothing_gets_zero(form):
    mask = MASKS["cross padded"]
    given = inputs("cross padded")
    out, *gradients = value_and_gradients(FORMS[form], given, mask)
    blind = ~lower(mask, 35, KEYS, torch.device("cpu")).any(-1)[:, 0]
    assert blind.any()
    assert (out.transpose(1, 2)[blind] == 0).all()
    assert (gradients[0].transpose(1, 2)[blind] == 0).all()
    assert all(g.isfinite().all() for g in gradients)


def test_gradients():
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 2, 5, 3), (1, 2, 5, 2), (1, 5, 4), (1, 5, 2), (2, 3, 4), (2, 3, 4)]
    given = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    for form in FORMS.values():
        assert torch.autograd.gradcheck(lambda *x, form=form: form(*x, Mask()), given)


@pytest.mark.parametrize("what", ["causal", "full", "dropout", "bias"])
def test_memory_of_blocks_grows_with_the_length(what):
    length = 1024
    q, k = (torch.randn(8, 2, length, 6, requires_grad=True) for _ in range(2))
    v = torch.randn(8, 2, length, 4, requires_grad=True)
    bias = torch.randn(2, length, length, requires_grad=True) if what == "bias" else None
    drop = (
        WeightDropout(0.1, torch.tensor(5), torch.arange(8), torch.arange(length))
        if what == "dropout"
        else None
    )
    with Largest() as largest:
        blocks.attention(q, k, v, Mask(what != "full"), drop, None, bias).sum().backward()
    assert (
        largest.elements <= 8 * 2 * 128 * length
    )  # one block of 128 rows; a bias [2, S, S] is no larger here
