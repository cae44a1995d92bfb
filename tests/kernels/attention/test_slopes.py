"""ALiBi's slopes against transformers' BLOOM and MPT, and the description of its bias against the bias itself."""

import pytest
import torch

from headway.kernels import random
from headway.kernels.attention.dense import WeightDropout
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.registry import mechanism
from headway.kernels.attention.slopes import Slopes, block_of, geometric, part_of

from .test_kernels import MASKS, QUERIES, Largest, heads

HEADS = [1, 2, 3, 6, 8, 12, 16, 20, 25, 71]


@pytest.mark.parametrize("heads", HEADS)
def test_slopes_are_blooms_and_mpts(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    bloom = build_alibi_tensor(torch.ones(1, 9, dtype=torch.int64), heads, torch.float32)[:, 0]
    mpt = build_mpt_alibi_tensor(heads, 9)[:, 0]
    slopes = torch.tensor(geometric(heads))
    ours = Slopes(slopes, torch.tensor([8]), torch.arange(9)).block()[:, 0]
    # Theirs are powers of a rounded base (up to 16 times 2^-24 off), times up to 8 places.
    torch.testing.assert_close(ours, bloom - bloom[:, -1:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours, mpt, rtol=1e-5, atol=1e-6)


def test_parts_are_parts_of_the_whole():
    places = torch.arange(9)
    bias = Slopes(torch.tensor(geometric(3)), places, places)
    whole = bias.block()
    for i, j in [(0, 8), (8, 0), (4, 4)]:
        assert whole[1, i, j] == -bias.slopes[1] * abs(i - j)  # both ways alike
    queries, keys, picked = slice(2, 5), slice(1, 9), torch.tensor([0, 7, 3])
    assert torch.equal(bias.block(queries, keys), whole[:, queries, keys])
    assert torch.equal(block_of(bias, queries, picked), block_of(whole, queries, picked))
    assert torch.equal(part_of(bias, queries, keys).block(), part_of(whole, queries, keys))
    assert torch.equal(bias.of_heads(1, 2).block(), whole[1:])


SELF = [name for name in MASKS if name not in QUERIES]
WORDS = ["dense", "sparsemax", "dilated", "strided", "fixed", "bigbird+sink", "softcap"]


def described(length=303):
    places = torch.arange(length)
    return Slopes(torch.tensor(geometric(6), dtype=torch.float64), places, places)


def value_and_gradients(compute, mask, bias, dropout=None, **x):
    inputs = heads(length=len(bias.queries) if isinstance(bias, Slopes) else bias.shape[1])
    out = compute(*inputs, mask, dropout, 0.4, bias, **x)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return out, *torch.autograd.grad(out, inputs, upstream)


@pytest.mark.parametrize("mask", SELF)
def test_a_description_is_its_bias(mask):
    drop = WeightDropout(0.25, torch.tensor(random.key(0, "x")), torch.tensor([7, 3]), torch.arange(303))
    for kernel in mechanism("dense").kernels_on("cpu").values():
        for dropout in (None, drop) if kernel.dropout else (None,):
            ours, theirs = (
                value_and_gradients(kernel.compute, MASKS[mask], bias, dropout)
                for bias in (described(), described().block())
            )
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)  # fp64, sums of 303 terms


@pytest.mark.parametrize("word", WORDS)
def test_other_mechanisms_take_descriptions(word):
    row = mechanism(word)
    x = {name: 16 if callable(value) or name == "stride" else value for name, value in row.settings.items()}
    if row.own:
        x["sink"] = torch.randn(6, dtype=torch.float64)
    expected = value_and_gradients(row.kernels["reference"].compute, Mask(), described().block(), **x)
    for kernel in row.kernels_on("cpu").values():
        ours = value_and_gradients(kernel.compute, Mask(), described(), **x)
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mask", SELF)
def test_entropy_and_weights_take_descriptions(mask):
    q, k, _ = heads()
    for compute in (mechanism("dense").entropy, mechanism("dense").weights):
        values = [compute(q, k, MASKS[mask], 0.4, bias) for bias in (described(), described().block())]
        torch.testing.assert_close(*values, rtol=1e-11, atol=1e-11)
        gradients = [torch.autograd.grad(y.square().sum(), (q, k)) for y in values]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("word", ["dense", "sparsemax"])
def test_row_blocks_write_out_no_more_than_a_block(word):
    length, places = 1024, torch.arange(1024)
    q, k, v = (torch.randn(1, 8, length, 4, requires_grad=True) for _ in range(3))
    bias = Slopes(torch.tensor(geometric(8)), places, places)
    with Largest() as largest:
        mechanism(word).kernels["blocks"].compute(q, k, v, Mask(), None, None, bias).sum().backward()
    assert largest.elements <= 8 * 128 * length  # blocks of 128 rows


@pytest.mark.matrix
def test_compiled_blocks_take_descriptions():
    torch.compiler.reset()
    compute = mechanism("dense").kernels["blocks"].compute
    blocks = torch.compile(compute, fullgraph=True, backend="aot_eager")
    bias = described(140)  # two blocks
    drop = WeightDropout(0.25, torch.tensor(random.key(0, "x")), torch.tensor([7, 3]), bias.queries)
    ours, theirs = (value_and_gradients(f, Mask(), bias, drop) for f in (blocks, compute))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_bf16_scores_take_exact_distances():
    q, k, v = (t.detach().bfloat16() for t in heads())
    bias = described()._replace(slopes=torch.tensor(geometric(6)))
    exact = (
        mechanism("dense")
        .kernels["reference"]
        .compute(*(t.double() for t in (q, k, v)), Mask(), None, None, described())
    )
    for kernel in ("reference", "blocks"):
        got = mechanism("dense").kernels[kernel].compute(q, k, v, Mask(), None, None, bias).double()
        assert (got - exact).norm() / exact.norm() < 3 * 2**-8  # as without a bias: scores, weights, output
