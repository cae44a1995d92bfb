"""What is drawn, its log-probability and gradients, against torch's categorical distribution and the reference."""

import pytest
import torch

from headway.kernels.attention.draw import Draw
from headway.kernels.attention.masks import Mask, lower
from headway.kernels.attention.registry import UnknownWord, mechanism
from headway.kernels.attention.rows import ELEMENTS
from headway.kernels.attention.slopes import Slopes, geometric
from headway.tests.kernels.attention.linear.sequences import KEYS, MASKS, heads
from headway.tests.pretrain.models.test_attention_contract import Largest

SEEN = {name: mask for name, mask in MASKS.items() if "cross" not in name}
HEADS = 4


def drawing(rows=2, length=KEYS, first=0):
    key = torch.tensor(123456789)
    slots = torch.arange(first, first + rows)
    return Draw(key, torch.tensor(0), key, slots, torch.arange(length))


def bias_of(kind, length=KEYS):
    if kind == "learned":
        generator = torch.Generator().manual_seed(5)
        made = torch.randn(HEADS, length, length, generator=generator, dtype=torch.float64)
        return made.requires_grad_()
    places = torch.arange(length)
    return Slopes(torch.tensor(geometric(HEADS)), places, places) if kind == "slopes" else None


def drawn(word, kernel, mask, bias=None, length=KEYS, **x):
    """Inputs, what was drawn, and gradients of its log-probabilities."""
    inputs = heads(length=length)
    found = mechanism(word).drawn[kernel](*inputs, mask, 0.3, bias, draw=drawing(length=length), **x)
    upstream = torch.randn(
        found.log_probability.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    wanted = [*inputs[:2], *([bias] if isinstance(bias, torch.Tensor) else [])]
    slopes = torch.autograd.grad(found.log_probability, wanted, upstream, retain_graph=True)
    return inputs, found, upstream, slopes


@pytest.mark.parametrize("bias", ["none", "learned"])
@pytest.mark.parametrize("kernel", ["reference", "blocks"])
@pytest.mark.parametrize("mask", SEEN)
def test_log_probabilities_are_torchs(mask, kernel, bias):
    bias = bias_of(bias)
    (q, k, v), found, upstream, slopes = drawn("reinforce", kernel, SEEN[mask], bias)
    each = [x.repeat_interleave(2, 1) for x in (k, v)]
    logits = 0.3 * q @ each[0].mT + (0 if bias is None else bias)
    seen = lower(SEEN[mask], KEYS, KEYS, torch.device("cpu"))
    logits = logits if seen is None else logits.masked_fill(~seen, -1e9)
    (up_v,) = torch.autograd.grad(found.out.sum(), v)
    # Which key was drawn: the one whose value came out.
    chosen = torch.cdist(found.out, each[1]).argmin(-1)
    torch.testing.assert_close(found.out, each[1].gather(2, chosen[..., None].expand_as(found.out)))
    theirs = torch.distributions.Categorical(logits=logits).log_prob(chosen)
    torch.testing.assert_close(found.log_probability, theirs, rtol=1e-10, atol=1e-10)
    wanted = [q, k, *([] if bias is None else [bias])]
    expected = torch.autograd.grad(theirs, wanted, upstream)
    torch.testing.assert_close(slopes, expected, rtol=1e-9, atol=1e-10)
    counts = torch.zeros(2, HEADS, KEYS).scatter_add_(2, chosen, torch.ones(chosen.shape))
    expected = counts.view(2, 2, 2, KEYS).sum(2).double()[..., None].expand_as(v)
    torch.testing.assert_close(up_v, expected)


@pytest.mark.parametrize("bias", ["none", "slopes", "learned"])
@pytest.mark.parametrize("mask", ["causal", "documents", "pairs"])
@pytest.mark.parametrize(
    ("word", "x"),
    [
        ("reinforce", {}),
        ("window+softcap+reinforce", {"window": 37, "softcap": 2.0}),
        ("strided+reinforce", {"stride": 16}),
        ("bigbird+reinforce", {"block": 16, "neighbours": 1, "global_tokens": 16, "random_blocks": 1}),
        ("cosine+reinforce", {"log_temperature": torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)}),
    ],
)
def test_blocks_draw_what_the_reference_does(word, x, mask, bias):
    row = mechanism(word)
    if "documents" not in row.supports and mask != "causal":
        mask = "full"
    (_, ours, _, slopes), (_, theirs, _, expected) = (
        drawn(word, kernel, SEEN[mask], bias_of(bias), **x) for kernel in ("blocks", "reference")
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(slopes, expected, rtol=1e-9, atol=1e-10)


def test_keys_are_drawn_as_often_as_they_weigh():
    q, k = (torch.randn(1, 1, n, 4, dtype=torch.float64) for n in (1, 5))
    rows, row = 4000, mechanism("reinforce")
    many = [x.expand(rows, -1, -1, -1) for x in (q, k, torch.eye(5, dtype=torch.float64)[None, None])]
    found = row.drawn["blocks"](*many, Mask(False), draw=drawing(rows, 1))
    weights = (q @ k.mT / 2).softmax(-1).flatten()
    # Shares of 4000 draws have deviations of sqrt(w (1 - w) / 4000).
    off = (found.out.mean((0, 1, 2)) - weights) / (weights * (1 - weights) / rows).sqrt()
    assert off.abs().max() < 4.5
    parts = [row.drawn["blocks"](*(x[:7] for x in many), Mask(False), draw=drawing(7, 1, first)).out
             for first in (0, 100)]  # fmt: skip
    torch.testing.assert_close(parts[0], found.out[:7])
    torch.testing.assert_close(parts[1], found.out[100:107])


def test_without_noise_the_best_key_is_taken():
    q, k, v = heads()
    still = drawing()._replace(noise=None)
    out = mechanism("reinforce").kernels["blocks"].compute(q, k, v, Mask(), draw=still)
    best = mechanism("reinforce").drawn["blocks"](q, k, v, Mask(), draw=still)
    torch.testing.assert_close(best.out, out)
    weights = mechanism("dense").weights(q, k, Mask())
    torch.testing.assert_close(best.log_probability, weights.amax(-1).log())


@pytest.mark.parametrize("kernel", ["reference", "blocks"])
def test_who_sees_nothing_draws_nothing(kernel):
    mask = Mask(False, torch.full((2, KEYS), 1), torch.zeros(2, KEYS, dtype=torch.int64))
    (_, _, v), found, _, slopes = drawn("reinforce", kernel, mask)
    assert not found.out.any()
    assert not found.log_probability.any()
    assert not any(slope.any() for slope in slopes)
    assert not torch.autograd.grad(found.out.sum(), v)[0].any()


def test_back_propagation_gives_scores_nothing():
    q, k, v = heads()
    for kernel in mechanism("reinforce").kernels.values():
        out = kernel.compute(q, k, v, Mask(), draw=drawing())
        assert not any(s.any() for s in torch.autograd.grad(out.sum(), (q, k)))


def test_memory_grows_with_the_length():
    found = []
    for length in (512, 2048):
        with Largest() as largest:
            drawn("reinforce", "blocks", Mask(), length=length)
        found.append(largest.elements)
    assert found[1] <= max(4 * found[0], ELEMENTS), found


def test_scores_of_several_products_are_refused():
    for score in ("additive", "talking", "differential"):
        for word in ("reinforce", "hard"):
            with pytest.raises(UnknownWord, match="one product of queries and keys") as refused:
                mechanism(f"{score}+{word}")
            assert refused.value.nearest == word
