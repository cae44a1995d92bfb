"""Every mechanism on a GPU: what the CPU computes, in fp64, by its fast kernel; and bf16 near it.

make gpu
"""

import pytest
import torch

from headway.kernels.attention.masks import Mask
from headway.pretrain.models.layers import Noise
from headway.tests.pretrain.models.test_attention_contract import (
    CASES,
    DISCRETE,
    NAMES,
    inputs,
    layer_of,
    masks,
    run,
    seat_of,
    value_and_gradients,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def there(mask: Mask) -> Mask:
    """The mask with its tensors on the GPU."""
    return Mask(*(part.cuda() if isinstance(part, torch.Tensor) else part for part in mask))


@pytest.mark.parametrize(("name", "mask"), CASES)
def test_the_gpu_computes_what_the_cpu_does(name, mask):
    mask, x = masks(name)[mask], inputs(name)
    theirs, expected = value_and_gradients(layer_of(name, causal=mask.causal), x, mask)
    layer = layer_of(name, causal=mask.causal).cuda()
    ours, found = value_and_gradients(layer, x.cuda(), there(mask))
    # fp64: the same sums in another order.
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-9, atol=1e-9)
    for key, slope in expected.items():
        torch.testing.assert_close(
            found[key].cpu(), slope, rtol=1e-8, atol=1e-8, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("name", NAMES)
def test_noise_is_the_same(name):
    mask, x = Mask(seat_of(name).causal), inputs(name)
    noise = [Noise.at(3, 7, torch.arange(2, device=device)) for device in ("cpu", "cuda")]
    theirs = run(layer_of(name), x, mask, noise[0])
    ours = run(layer_of(name).cuda(), x.cuda(), mask, noise[1])
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_near(name):
    mask, x = Mask(seat_of(name).causal), inputs(name, dtype=torch.bfloat16)
    rough = layer_of(name, dtype=torch.bfloat16)
    exact = layer_of(name)
    for p, q in zip(exact.parameters(), rough.parameters(), strict=True):
        p.data.copy_(q.data)
    theirs = run(exact, x.double(), mask)
    ours = run(rough.cuda(), x.cuda(), mask).double().cpu()
    assert ours.isfinite().all()
    assert (ours - theirs).norm() / theirs.norm() < DISCRETE.get(name, 0.1)
