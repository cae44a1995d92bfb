"""What is asked of FlexAttention, against the reference: its plain form on CPU, its fused kernel on a GPU.

The plain form refuses a backward on CPU and has one: the check is taken away.
"""

import pytest
import torch
from torch.nn.attention import flex_attention

from headway.kernels.attention.masks import Mask
from headway.kernels.attention.registry import Shape, mechanism
from headway.kernels.attention.slopes import Slopes, geometric
from headway.tests.pretrain.models.test_attention_contract import SMALL

WORDS = (
    "dense", "window", "dilated", "local", "strided", "fixed", "longformer", "bigbird", "softcap", "cosine",
    "sink", "window+softcap+sink", "streaming+cosine", "differential",
)  # fmt: skip
S = 150
DOCUMENTS = torch.tensor([[0] * 60 + [1] * 72 + [-1] * 18, [3] * 150])
MASKS = {
    "causal": Mask(),
    "both ways": Mask(False),
    "documents": Mask(True, DOCUMENTS),
    "pairs": Mask(False, DOCUMENTS),
    "prefix": Mask(True, prefix=torch.tensor([0, 40])),
}


def inputs(name, device="cpu", dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    row = mechanism(name)
    shape = Shape(4, 2, 32, 128, S, S, True, {})
    q, k, v = (torch.randn(2, h, S, 32, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    own = {
        key: torch.randn(own.shape(shape), generator=generator, dtype=torch.float64) / 2
        for key, own in row.own.items()
    }
    tensors = [t.to(device, dtype).requires_grad_() for t in (q, k, v, *own.values())]
    settings = {key: SMALL.get(key, 3.0) for key in row.settings}
    if "first_lambda" in row.settings:
        settings["first_lambda"] = 0.3
    return tensors, tuple(own), settings


def compute(name, kernel, mask, bias=None, **where):
    tensors, names, settings = inputs(name, **where)
    extras = dict(zip(names, tensors[3:], strict=True))
    kernel = mechanism(name).kernels[kernel].compute
    out = kernel(*tensors[:3], mask, None, None, bias, **settings, **extras)
    up = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    return out, *torch.autograd.grad(out, tensors, up)


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", WORDS)
def test_it_is_asked_for_the_reference(plain, name, mask):
    if mask == "prefix" and "prefix" not in mechanism(name).supports:
        pytest.skip("takes no prefix")
    ours, theirs = (compute(name, kernel, MASKS[mask]) for kernel in ("flex", "reference"))
    # It computes in fp32 at places, and gives a sum a row in fp32.
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("mask", ["causal", "pairs"])
def test_slopes_are_described(plain, mask):
    slopes = Slopes(torch.tensor(geometric(4), dtype=torch.float64), torch.arange(S), torch.arange(S))
    ours, theirs = (compute("dense", kernel, MASKS[mask], slopes) for kernel in ("flex", "reference"))
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


def there(mask):
    return Mask(*(part.cuda() if isinstance(part, torch.Tensor) else part for part in mask))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", WORDS)
def test_the_fused_kernel_computes_the_reference(name):
    mask = MASKS["documents" if "documents" in mechanism(name).supports else "both ways"]
    exact = compute(name, "reference", mask)
    ours = compute(name, "flex", there(mask), device="cuda", dtype=torch.float32)
    for got, want in zip(ours, exact, strict=True):
        # fp32, sums of 150 terms, exponentials of scores up to 30.
        torch.testing.assert_close(got.cpu().double(), want, rtol=2e-3, atol=5e-4)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["dense", "window+softcap+sink"])
def test_the_fused_kernel_in_bf16(name):
    exact = compute(name, "reference", MASKS["causal"])
    for got, want in zip(
        compute(name, "flex", Mask(), device="cuda", dtype=torch.bfloat16), exact, strict=True
    ):
        # Inputs are rounded by 2^-9, and so are weights.
        assert (got.cpu().double() - want).norm() <= 0.05 * want.norm() + 1e-3


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_fused_kernel_knows_slopes():
    slopes = Slopes(torch.tensor(geometric(4)), torch.arange(S), torch.arange(S))
    exact = compute("dense", "reference", Mask(), slopes)
    slopes = Slopes(*(part.cuda() for part in slopes))
    ours = compute("dense", "flex", Mask(), slopes, device="cuda", dtype=torch.float32)
    for got, want in zip(ours, exact, strict=True):
        torch.testing.assert_close(got.cpu().double(), want, rtol=2e-3, atol=5e-4)
