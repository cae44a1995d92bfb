"""Every registered kernel against its mechanism's reference, and the reference against the paper's equation."""

import math

import pytest
import torch

from headway.kernels import random
from headway.kernels.attention.choose import KernelUnavailable, choose
from headway.kernels.attention.dense import WeightDropout, reference
from headway.kernels.attention.masks import Mask, lower
from headway.kernels.attention.registry import MECHANISMS

KERNELS = [(m, k) for m in MECHANISMS for k in MECHANISMS[m].kernels]
DOCUMENTS = torch.tensor([[0] * 100 + [1] * 33 + [2] * 170, [4] * 303], dtype=torch.int32)
MASKS = {
    "causal": Mask(),
    "full": Mask(False),
    "documents": Mask(True, DOCUMENTS),
    "pairs": Mask(False, DOCUMENTS),
}


def heads(queries=6, keys=2, length=303, dim=20, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, queries, length, dim), (2, keys, length, dim), (2, keys, length, dim)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def value_and_gradients(compute, inputs, *args):
    out = compute(*inputs, *args)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))


def test_reference_is_the_equation():
    q, k, v = heads(6, 2, 9, 4)
    out = reference(q, k, v, MASKS["causal"])
    for b, h, i in [(0, 0, 0), (1, 5, 8), (0, 3, 4)]:
        seen = slice(0, i + 1)  # causal; grouped: query head h reads key/value head h // 3
        weights = torch.softmax(k[b, h // 3, seen] @ q[b, h, i] / math.sqrt(4), 0)
        torch.testing.assert_close(out[b, h, i], weights @ v[b, h // 3, seen])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("mechanism", "kernel"), KERNELS)
def test_kernel_matches_reference(mechanism, kernel, mask):
    known = MECHANISMS[mechanism].kernels
    ours = value_and_gradients(known[kernel].compute, heads(), MASKS[mask])
    theirs = value_and_gradients(known["reference"].compute, heads(), MASKS[mask])
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("mechanism", "kernel"), KERNELS)
def test_bf16_is_as_good_as_bf16_can_be(mechanism, kernel):
    inputs = heads(dtype=torch.bfloat16)
    exact = value_and_gradients(reference, [t.detach().double().requires_grad_() for t in inputs], Mask())
    for got, want in zip(
        value_and_gradients(choose(mechanism, kernel).compute, inputs, Mask()), exact, strict=True
    ):
        # Each of three roundings in a chain (scores, weights, output) is off by at most 2^-9 relative.
        assert (got.double() - want).norm() / want.norm() < 3 * 2**-8


@pytest.mark.parametrize("mask", ["causal", "pairs"])
def test_dropout_is_the_references(mask):
    key = torch.tensor(random.key(0, "attention"))
    drop = WeightDropout(0.25, key, torch.tensor([7, 3]), torch.arange(303), first_head=4)
    for kernel in MECHANISMS["dense"].kernels.values():
        if kernel.dropout:
            ours = value_and_gradients(kernel.compute, heads(), MASKS[mask], drop)
            theirs = value_and_gradients(reference, heads(), MASKS[mask], drop)
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


def test_compiled_blocks_match():
    inputs, drop = heads(4, 2, 200, 16, torch.float32), None
    blocks = torch.compile(MECHANISMS["dense"].kernels["blocks"].compute, fullgraph=True)
    ours, theirs = (value_and_gradients(f, inputs, Mask(), drop) for f in (blocks, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # fp32, sums of 200 terms


def test_masks_lower_in_parts():
    for mask in MASKS.values():
        whole = lower(mask, 303, torch.device("cpu"))
        part = lower(mask, 303, torch.device("cpu"), slice(10, 150), slice(90, 303))
        assert (whole is None and part is None) or torch.equal(whole[..., 10:150, 90:], part)


def test_choice():
    assert choose("dense").name == "sdpa"
    assert choose("dense", dropout=True).name == "blocks"
    assert choose("dense", dtype=torch.bfloat16, compiled=True).name == "blocks"
    for name in MECHANISMS["dense"].kernels:
        assert choose("dense", name).name == name
    with pytest.raises(KernelUnavailable, match=r"'flash'.*reference, sdpa, blocks"):
        choose("dense", "flash")
    with pytest.raises(KernelUnavailable, match=r"sdpa.*dropout.*blocks"):
        choose("dense", "sdpa", dropout=True)


def test_costs():
    flops = MECHANISMS["dense"].flops
    assert flops(2, 8, 10, False) == 2 * 2 * 2 * 8 * 100  # two products of 2 FLOPs a term
    assert flops(2, 8, 10, True) == 2 * 2 * 2 * 8 * 55
    assert MECHANISMS["dense"].bytes(4, 2, 8, 10, 2) == (4 + 2 + 2 + 4) * 8 * 10 * 2
