"""FlashAttention 3 and 4: their seats in PyTorch, and what is said where their packages are missing."""

import pytest
import torch

from headway.kernels.attention import flash
from headway.kernels.attention.choose import KernelUnavailable, choose
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.registry import mechanism

MISSING = [name for name in flash.PACKAGES if flash.unavailable(name)]


@pytest.mark.parametrize("name", flash.PACKAGES)
def test_pytorch_has_a_seat(name):
    assert name.upper() in torch.nn.attention.list_flash_attention_impls()


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_package_is_named(name):
    rule = flash.PACKAGES[name].replace(".", r"\.")
    with pytest.raises(KernelUnavailable, match=rf"'{name}': it needs the module {rule}.*auto"):
        choose("dense", name, device="cuda", dtype=torch.bfloat16)


def test_it_runs_on_gpus_alone():
    with pytest.raises(KernelUnavailable, match=r"'fa3': it runs on cuda.*not on cpu"):
        choose("dense", "fa3")


def test_masks_that_it_has_not_are_refused_before_it_is_loaded():
    q = k = v = torch.randn(1, 2, 4, 8)
    compute = mechanism("dense").kernels["fa4"].compute
    with pytest.raises(KernelUnavailable, match=r"fa4.*separates no documents"):
        compute(q, k, v, Mask(True, torch.zeros(1, 4, dtype=torch.int32)))


def test_what_it_does_not_compute_has_no_such_kernel():
    for word in ("window", "sparsemax", "softcap", "differential"):
        assert not set(flash.PACKAGES) & set(mechanism(word).kernels)
