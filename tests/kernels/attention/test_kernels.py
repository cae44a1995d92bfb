"""Every registered kernel against its mechanism's reference, and the reference against the paper's equation."""

import math

import pytest
import torch
import torch.nn.functional as F

from headway.kernels import random
from headway.kernels.attention import choose as choices
from headway.kernels.attention.choose import KernelUnavailable, choose
from headway.kernels.attention.dense import WeightDropout, reference
from headway.kernels.attention.masks import Mask, lower
from headway.kernels.attention.registry import Kernel, Shape, words
from headway.kernels.attention.scopes import Window

MECHANISMS = {"dense": words()["dense"]}
KERNELS = [(m, k) for m in MECHANISMS for k in MECHANISMS[m].kernels_on("cpu")]
DOCUMENTS = torch.tensor([[0] * 100 + [1] * 33 + [2] * 170, [4] * 303], dtype=torch.int32)
PADDED = torch.tensor([[0] * 290 + [-1] * 13, [0] * 170 + [-1] * 133])
TARGETS = torch.tensor([[0] * 100 + [-1] * 5, [0] * 50 + [1] * 55])
MASKS = {
    "causal": Mask(),
    "full": Mask(False),
    "documents": Mask(True, DOCUMENTS),
    "pairs": Mask(False, DOCUMENTS),
    "padded": Mask(False, PADDED),
    "prefix": Mask(True, prefix=torch.tensor([0, 150])),
    "padded prefix": Mask(True, PADDED, prefix=torch.tensor([303, 7])),
    "window": Mask(scope=Window(40)),
    "window both ways": Mask(False, scope=Window(150)),
    "window of itself": Mask(False, scope=Window(1)),
    "window of pairs": Mask(False, PADDED, scope=Window(30)),
    "window of a prefix": Mask(True, DOCUMENTS, prefix=torch.tensor([0, 150]), scope=Window(140)),
    "cross": Mask(False),
    "cross padded": Mask(False, TARGETS, PADDED),  # document 1 of the second row has no keys at all
}
QUERIES = {"cross": 105, "cross padded": 105}
KEYS = 303


def heads(queries=6, keys=2, length=303, dim=20, dtype=torch.float64, rows=None):
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, queries, rows or length, dim), (2, keys, length, dim), (2, keys, length, dim)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def inputs_of(mask, with_bias, dtype=torch.float64):
    """q, k, v and, with a bias, that too."""
    rows = QUERIES.get(mask, KEYS)
    inputs = heads(rows=rows, dtype=dtype)
    if with_bias:
        bias = torch.randn(6, rows, KEYS, generator=torch.Generator().manual_seed(3), dtype=dtype)
        inputs.append(bias.requires_grad_())
    return inputs


def value_and_gradients(compute, inputs, mask, dropout=None, scale=None):
    out = compute(*inputs[:3], mask, dropout, scale, *inputs[3:])
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))


def torchs_own(q, k, v, mask, dropout=None, scale=None, bias=None):
    """PyTorch's math path with the mask written out, place by place."""
    seen = torch.ones(2, 1, q.shape[2], KEYS, dtype=torch.bool)
    places = [torch.arange(x.shape[2]) for x in (q, k)]
    for b in range(2):
        if mask.causal:
            seen[b] &= places[0][:, None] >= places[1]
        if mask.prefix is not None:
            seen[b, :, :, : mask.prefix[b]] = True
        if mask.documents is not None:
            theirs = mask.documents if mask.key_documents is None else mask.key_documents
            seen[b] &= mask.documents[b][:, None] == theirs[b]
        if mask.window is not None:
            seen[b] &= (places[0][:, None] - places[1]).abs() < mask.window
    added = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, -math.inf)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return F.scaled_dot_product_attention(
            q, k, v, added if bias is None else added + bias, scale=scale, enable_gqa=True
        )


def test_reference_is_the_equation():
    q, k, v = heads(6, 2, 9, 4)
    bias = torch.randn(6, 9, 9, dtype=torch.float64)
    out = reference(q, k, v, MASKS["causal"])
    biased = reference(q, k, v, MASKS["causal"], None, 0.3, bias)
    for b, h, i in [(0, 0, 0), (1, 5, 8), (0, 3, 4)]:
        seen = slice(0, i + 1)  # causal; grouped: query head h reads key/value head h // 3
        products = k[b, h // 3, seen] @ q[b, h, i]
        weights = torch.softmax(products / math.sqrt(4), 0)
        torch.testing.assert_close(out[b, h, i], weights @ v[b, h // 3, seen])
        weights = torch.softmax(0.3 * products + bias[h, i, seen], 0)
        torch.testing.assert_close(biased[b, h, i], weights @ v[b, h // 3, seen])


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_reference_is_torchs(mask, with_bias):
    inputs = inputs_of(mask, with_bias)
    for scale in (None, 0.4):
        ours, theirs = (
            value_and_gradients(f, inputs, MASKS[mask], scale=scale) for f in (reference, torchs_own)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)  # fp64, sums of 303 terms


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("mechanism", "kernel"), KERNELS)
def test_kernel_matches_reference(mechanism, kernel, mask, with_bias):
    known = MECHANISMS[mechanism].kernels
    if with_bias and not known[kernel].bias:
        pytest.skip("takes no bias")
    for scale in (None, 0.4) if with_bias else (None,):
        inputs = inputs_of(mask, with_bias)
        ours, theirs = (
            value_and_gradients(known[name].compute, inputs, MASKS[mask], scale=scale)
            for name in (kernel, "reference")
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    ours = value_and_gradients(known[kernel].compute, inputs_of(mask, with_bias, torch.float32), MASKS[mask])
    theirs = value_and_gradients(reference, inputs_of(mask, with_bias, torch.float32), MASKS[mask])
    # Roundings of 2^-24 in sums of up to 303 x 2 terms of order 1, in another order.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("mechanism", "kernel"), KERNELS)
def test_a_query_that_sees_nothing_gets_zero(mechanism, kernel, with_bias):
    compute = MECHANISMS[mechanism].kernels[kernel]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        inputs, mask = inputs_of("cross padded", with_bias, dtype), MASKS["cross padded"]
        out, *gradients = value_and_gradients(compute.compute, inputs, mask)
        assert (out[1, :, 50:] == 0).all()
        assert (out[:, :, :50] != 0).any(-1).all()
        assert (gradients[0][1, :, 50:] == 0).all()
        assert all(g.isfinite().all() for g in gradients)
    if compute.dropout:
        drop = WeightDropout(0.25, torch.tensor(random.key(0, "x")), torch.tensor([7, 3]), torch.arange(105))
        out, *gradients = value_and_gradients(compute.compute, inputs, mask, drop)
        assert (out[1, :, 50:] == 0).all()
        assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(("mechanism", "kernel"), KERNELS)
def test_bf16_is_as_good_as_bf16_can_be(mechanism, kernel):
    inputs = heads(dtype=torch.bfloat16)
    exact = value_and_gradients(reference, [t.detach().double().requires_grad_() for t in inputs], Mask())
    for got, want in zip(
        value_and_gradients(choose(mechanism, kernel).compute, inputs, Mask()), exact, strict=True
    ):
        # Each of three roundings in a chain (scores, weights, output) is off by at most 2^-9 relative.
        assert (got.double() - want).norm() / want.norm() < 3 * 2**-8


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("mask", ["causal", "pairs", "padded prefix", "cross padded"])
def test_dropout_is_the_references(mask, with_bias):
    key, rows = torch.tensor(random.key(0, "attention")), QUERIES.get(mask, KEYS)
    drop = WeightDropout(0.25, key, torch.tensor([7, 3]), torch.arange(rows), first_head=4)
    for kernel in MECHANISMS["dense"].kernels_on("cpu").values():
        if kernel.dropout:
            ours = value_and_gradients(kernel.compute, inputs_of(mask, with_bias), MASKS[mask], drop)
            theirs = value_and_gradients(reference, inputs_of(mask, with_bias), MASKS[mask], drop)
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_dropout_of_heads_and_rows_does_not_depend_on_where_they_live():
    key, slots = torch.tensor(random.key(0, "attention")), torch.tensor([7, 3])
    q, k, v = heads(6, 6)
    drop = WeightDropout(0.25, key, slots, torch.arange(303))
    whole = reference(q, k, v, Mask(), drop)
    upper = reference(q[:, 3:], k[:, 3:], v[:, 3:], Mask(), drop._replace(first_head=3))
    torch.testing.assert_close(whole[:, 3:], upper)
    row = reference(q[1:], k[1:], v[1:], Mask(), drop._replace(slots=slots[1:]))
    torch.testing.assert_close(whole[1:], row)


@pytest.mark.parametrize("mask", ["causal", "padded prefix", "cross padded"])
def test_compiled_blocks_match(mask):
    torch.compiler.reset()
    inputs = inputs_of(mask, mask != "causal", torch.float32)
    # One graph without breaks for every mask; generated code, which takes long to build, for one.
    backend = "inductor" if mask == "causal" else "aot_eager"
    blocks = torch.compile(MECHANISMS["dense"].kernels["blocks"].compute, fullgraph=True, backend=backend)
    ours, theirs = (value_and_gradients(f, inputs, MASKS[mask]) for f in (blocks, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # fp32, sums of 303 terms


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = (t.numel() for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t))
        self.elements = max([self.elements, *found])
        return out


@pytest.mark.parametrize("what", ["causal", "full", "documents", "dropout", "cross", "bias", "entropy"])
def test_memory_of_blocks_grows_with_the_length(what):
    length = 1024
    documents = torch.zeros(8, length, dtype=torch.int32) if what == "documents" else None
    shape = (8, 2, length, 4)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, length, length, requires_grad=True) if what == "bias" else None
    drop = None
    if what == "dropout":
        drop = WeightDropout(0.1, torch.tensor(5), torch.arange(8), torch.arange(length))
    mask = Mask(what in ("causal", "dropout", "bias"), documents)
    with Largest() as largest:
        if what == "entropy":
            MECHANISMS["dense"].entropy(q, k, mask).sum().backward()
        else:
            queries = q[:, :, :700] if what == "cross" else q
            choose("dense", "blocks").compute(queries, k, v, mask, drop, None, bias).sum().backward()
    # One block of 128 rows; a bias [2, S, S] is no larger here.
    assert largest.elements <= 8 * 2 * 128 * length


def test_masks_lower_in_parts():
    for name, mask in MASKS.items():
        rows = QUERIES.get(name, KEYS)
        whole = lower(mask, rows, KEYS, torch.device("cpu"))
        part = lower(mask, rows, KEYS, torch.device("cpu"), slice(10, 95), slice(90, 303))
        assert (whole is None and part is None) or torch.equal(whole[..., 10:95, 90:], part)


def test_prefix_is_seen_by_all():
    seen = lower(Mask(True, prefix=torch.tensor([0, 3])), 5, 5, torch.device("cpu"))
    assert torch.equal(seen[0, 0], torch.ones(5, 5).tril().bool())
    assert seen[1, 0].int().tolist() == [[1, 1, 1, 0, 0]] * 3 + [[1, 1, 1, 1, 0], [1] * 5]


def test_causal_masks_are_square():
    with pytest.raises(AssertionError, match="as many queries as keys"):
        lower(Mask(), 4, 5, torch.device("cpu"))


def test_entropy_is_torchs():
    for name, mask in MASKS.items():
        q, k, _, bias = inputs_of(name, True)
        for scale, added in ((None, None), (0.4, bias)):
            inputs = (q, k) if added is None else (q, k, bias)
            ours = MECHANISMS["dense"].entropy(q, k, mask, scale, added)
            rows = torch.distributions.Categorical(logits=logits(q, k, mask, scale, added)).entropy()
            counts = torch.ones(2, 1, q.shape[2]) if mask.documents is None else mask.documents[:, None] >= 0
            seen = lower(mask, q.shape[2], KEYS, torch.device("cpu"))
            if seen is not None:
                counts = counts * seen.any(-1)
            theirs = (rows * counts).sum((1, 2)) / counts.expand(rows.shape).sum((1, 2))
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11, msg=name)
            upstream = torch.tensor([0.7, -1.3], dtype=torch.float64)
            gradients = [torch.autograd.grad(y, inputs, upstream) for y in (ours, theirs)]
            torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def logits(q, k, mask, scale, bias):
    scores = q @ k.repeat_interleave(3, 1).mT * (1 / math.sqrt(20) if scale is None else scale)
    scores = scores if bias is None else scores + bias
    seen = lower(mask, q.shape[2], KEYS, torch.device("cpu"))
    return scores if seen is None else torch.where(seen | ~seen.any(-1, keepdim=True), scores, -math.inf)


def test_entropy_counts_no_padding_and_is_zero_without_queries():
    q, k, _ = heads()
    entropy = MECHANISMS["dense"].entropy
    alone = entropy(q[:, :, :170], k[:, :, :170], Mask(False))
    torch.testing.assert_close(entropy(q, k, MASKS["padded"])[1], alone[1])
    nothing = entropy(q, k, Mask(False, torch.full((2, KEYS), -1)))
    assert (nothing == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(nothing.sum(), (q, k)))


def test_entropy_compiles():
    q, k, _, bias = inputs_of("padded prefix", True, torch.float32)
    entropy, mask = MECHANISMS["dense"].entropy, MASKS["padded prefix"]
    ours, theirs = (
        f(q, k, mask, None, bias)
        for f in (torch.compile(entropy, fullgraph=True, backend="aot_eager"), entropy)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # means of entropies near 5 nats
    gradients = [torch.autograd.grad(y.sum(), (q, k, bias)) for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-7)  # differences of terms of 1e-5


def test_weights_are_what_the_output_averages():
    q, k, v, bias = inputs_of("cross padded", True)
    weights = MECHANISMS["dense"].weights(q, k, MASKS["cross padded"], 0.4, bias)
    out = reference(q, k, v, MASKS["cross padded"], None, 0.4, bias)
    torch.testing.assert_close(weights @ v.repeat_interleave(3, 1), out)


def test_choice_without_cpp_kernels(monkeypatch):
    """`test_cpp.py` has the choice where they are."""
    monkeypatch.setattr(choices.cpp, "unavailable", lambda dtype=None: "no compiler")
    assert choose("dense").name == "sdpa"
    assert choose("dense", dropout=True).name == "blocks"
    assert choose("dense", dtype=torch.bfloat16, compiled=True).name == "blocks"
    assert choose("dense", dtype=torch.bfloat16, keys=65).name == "blocks"
    assert choose("dense", dtype=torch.bfloat16, keys=512).name == "sdpa"
    assert choose("dense", bias=True).name == "blocks"
    for word in ("window", "softcap", "sink", "bigbird+sink", "sparsemax"):
        assert choose(word).name == "blocks"
    with pytest.raises(KernelUnavailable, match=r"cpp.*no compiler.*auto"):
        choose("dense", "cpp")


def test_choice():
    assert choose("dense", bias=True, described=False, device="cuda", dtype=torch.float64).name == "sdpa"
    for name in MECHANISMS["dense"].kernels_on("cpu"):
        assert choose("dense", name).name == name
    with pytest.raises(
        KernelUnavailable, match=r"'flash'.*reference, sdpa, blocks, cpp, flex, triton, fa3, fa4"
    ):
        choose("dense", "flash")
    with pytest.raises(KernelUnavailable, match=r"flex.*runs on cuda.*not on cpu"):
        choose("dense", "flex")
    for word in ("window", "softcap", "sink", "bigbird+sink"):
        assert choose(word, device="cuda", dtype=torch.bfloat16).name == "flex"
        assert choose(word, device="cuda", dtype=torch.float64).name == "blocks"
    assert choose("dense", device="cuda", bias=True, described=True).name == "flex"
    with pytest.raises(KernelUnavailable, match=r"sdpa.*dropout.*blocks"):
        choose("dense", "sdpa", dropout=True)


def test_choice_of_triton(monkeypatch):
    """For what PyTorch's and FlexAttention's kernels lack, on GPUs that have it."""
    monkeypatch.setattr(choices.fused, "unavailable", lambda device: None if device == "cuda" else "no GPU")
    gpu = {"device": "cuda", "dtype": torch.bfloat16}
    assert choose("dense", **gpu).name == "sdpa"
    assert choose("dense", bias=True, **gpu).name == "triton"
    for word in ("dense", "window", "softcap", "sink", "bigbird+sink", "sparsemax", "differential"):
        assert choose(word, dropout=True, **gpu).name == "triton"
        assert choose(word, dropout=True, device="cuda", dtype=torch.float64).name == "blocks"
        assert choose(word, dropout=True, width=512, **gpu).name == "blocks"
        assert choose(word, dropout=True).name != "triton"
    assert choose("sparsemax", **gpu).name == "triton"
    assert choose("sparsemax", bias=True, **gpu).name == "blocks"
    for word in ("linear", "performer", "rfa", "gla", "delta"):
        assert choose(word, **gpu).name == "triton"
        assert choose(word, causal=False, **gpu).name == "chunks"
    with pytest.raises(
        KernelUnavailable, match="it computes causal attention alone; nearest legal choice: chunks"
    ):
        choose("linear", "triton", causal=False, **gpu)
    with pytest.raises(KernelUnavailable, match="heads up to 256 wide, not 512"):
        choose("dense", "triton", width=512, **gpu)
    with pytest.raises(KernelUnavailable, match="'triton': it takes fp32, bf16 and fp16"):
        choose("dense", "triton", device="cuda", dtype=torch.float64)
    with pytest.raises(KernelUnavailable, match="runs on cuda, forward and backward, not on cpu"):
        choose("dense", "triton")
    choices.fused.prefer("torch")
    try:
        assert choose("dense", dropout=True, **gpu).name == "blocks"
        assert choose("gla", **gpu).name == "chunks"
    finally:
        choices.fused.prefer("auto")


def test_a_kernel_without_bias_is_refused(monkeypatch):
    plain = Kernel("plain", reference, dropout=True, bias=False, memory="S^2")
    monkeypatch.setitem(MECHANISMS["dense"].kernels, "plain", plain)
    with pytest.raises(KernelUnavailable, match=r"plain.*no bias.*blocks"):
        choose("dense", "plain", bias=True)


def test_costs():
    def flops(heads, dim, causal):
        return MECHANISMS["dense"].flops(Shape(heads, heads, dim, heads * dim, 10, 10, causal, {}))

    assert flops(2, 8, False) == 2 * 2 * 2 * 8 * 100  # two products of 2 FLOPs a term
    assert flops(2, 8, True) == 2 * 2 * 2 * 8 * 55
    shape = Shape(4, 2, 8, 32, 10, 10, True, {})
    assert MECHANISMS["dense"].bytes(shape, 2) == (4 + 2 + 2 + 4) * 8 * 10 * 2
