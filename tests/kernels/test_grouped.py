"""Grouped products and the ways to compute experts, against the loop over experts."""

import pytest
import torch

from headway.kernels import grouped
from headway.kernels.experts import KERNELS, Pairs, Weights

ENDS = torch.tensor([3, 3, 8, 11])  # the second group is empty, two of 13 rows are in none


def operands(dtype, f=8, e=16, bias=True):
    draw = torch.Generator().manual_seed(0)
    shapes = [(13, e), (4, f, e)] + [(4, f)] * bias
    tensors = [torch.randn(s, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    return tensors if bias else [*tensors, None]


def by_hand(x, w, bias):
    rows, start = [], 0
    for i, end in enumerate(ENDS.tolist()):
        y = x[start:end] @ w[i].T
        rows.append(y if bias is None else y + bias[i])
        start = end
    return torch.cat([*rows, x.new_zeros(len(x) - start, w.shape[1])])


def gradients(y, tensors):
    upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad(y, [t for t in tensors if t is not None], upstream)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("f", [8, 7])
def test_linear(f, bias):
    tensors = operands(torch.float64, f=f, bias=bias)
    ours, theirs = grouped.linear(*tensors, ENDS), by_hand(*tensors)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradients(ours, tensors), gradients(theirs, tensors), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_native(dtype, bias):
    """What a GPU runs, on torch's CPU path. Rows of no group hold what must not get out."""
    tensors = operands(dtype, bias=bias)
    with torch.no_grad():
        tensors[0][11:] = torch.nan
    ours = grouped.native(*tensors, ENDS)
    theirs = by_hand(*tensors)
    eps = torch.finfo(dtype).eps  # sums of 16 products of order one
    torch.testing.assert_close(ours, theirs, rtol=4 * eps, atol=16 * eps)
    for a, b in zip(gradients(ours, tensors), gradients(theirs, tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=4 * eps, atol=16 * eps)


def test_weights_of_another_dtype():
    """Products in x's dtype; the weights' gradients in theirs."""
    x, w, bias = operands(torch.float32)
    narrow = x.detach().bfloat16().requires_grad_()
    ours, theirs = grouped.linear(narrow, w, bias, ENDS), by_hand(narrow, w.bfloat16(), bias.bfloat16())
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-4)
    for a, b in zip(gradients(ours, [narrow, w, bias]), gradients(theirs, [narrow, w, bias]), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-4)  # bf16 keeps 8 bits of sums below 16


def test_native_rule():
    assert grouped.native_rule(torch.bfloat16, 64, 24) is None
    assert "fp32" in grouped.native_rule(torch.float64, 64)
    assert "multiples of 8" in grouped.native_rule(torch.bfloat16, 64, 12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_take_and_combine(dtype):
    token = torch.tensor([2, 0, 2, 1, 2, 0])
    x = torch.randn(4, 100_000 // 6, dtype=dtype, requires_grad=True)  # wider than a chunk holds
    weight = torch.rand(
        6, dtype=torch.float64 if dtype == torch.float64 else torch.float32, requires_grad=True
    )
    ours = grouped.combine_rows(grouped.take_rows(x, token), weight, token, 4)
    sums = torch.zeros(4, dtype=weight.dtype).index_add(0, token, weight)
    theirs = (x * sums[:, None]).to(dtype)
    tolerance = (
        1e-12 if dtype == torch.float64 else 2**-6
    )  # one rounding to bf16 of each of up to three terms
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    g = torch.randn_like(ours) / 100
    for a, b in zip(
        torch.autograd.grad(ours, (x, weight), g), torch.autograd.grad(theirs, (x, weight), g), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=4 * tolerance, atol=4 * tolerance)


def pairs_and_weights(dtype, gated, bias):
    """30 tokens of two experts each, of which 7 pairs are dropped; expert 3 of 5 has none."""
    draw = torch.Generator().manual_seed(1)
    n, k, x, e, f = 30, 2, 5, 6, 10

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()

    chosen = torch.rand(n, x, generator=draw).index_fill(1, torch.tensor([3]), -1).topk(k).indices.flatten()
    chosen[torch.randperm(n * k, generator=draw)[:7]] = x
    place = torch.stack([(chosen[:i] == c).sum() for i, c in enumerate(chosen)])
    token = torch.arange(n).repeat_interleave(k)
    pairs = Pairs(token, chosen, normal(n * k), place, int(place[chosen < x].max()) + 3)
    biases = [normal(x, f), normal(x, e), normal(x, f)] if bias else [None] * 3
    gate = normal(x, f, e) if gated else None
    return (
        normal(n, e),
        pairs,
        Weights(normal(x, f, e), normal(x, e, f), gate, *biases[:2], biases[2] if gated else None),
    )


@pytest.mark.parametrize("kernel", ["grouped", "batched"])
@pytest.mark.parametrize(("gated", "bias"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kernels_against_reference(kernel, gated, bias, dtype):
    x, pairs, weights = pairs_and_weights(dtype, gated, bias)
    activation = "swiglu" if gated else "gelu"
    leaves = [x, pairs.weight_P, *(w for w in weights if w is not None)]
    ours, theirs = (KERNELS[name](x, pairs, weights, activation) for name in (kernel, "reference"))
    # Sums of up to 30 x 10 terms of order ten: an absolute error of some hundred units in the last place.
    eps = 1000 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=eps, atol=eps)
    for a, b in zip(gradients(ours, leaves), gradients(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=eps, atol=eps)
        if len(a) == 5:
            assert not a[3].any()


def test_no_pairs_at_all():
    x, pairs, weights = pairs_and_weights(torch.float64, gated=True, bias=True)
    none = pairs._replace(expert_P=torch.full_like(pairs.expert_P, 5))
    leaves = [x, none.weight_P, *weights]
    for name, kernel in KERNELS.items():
        y = kernel(x, none, weights, "swiglu")
        assert not y.any(), name
        assert not any(g.any() for g in gradients(y, leaves)), name
