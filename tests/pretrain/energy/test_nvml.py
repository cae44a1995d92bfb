"""NVML: what a machine without a driver says, the integral of power readings, and a real GPU where there is one."""

import time

import numpy as np
import pytest
import torch

from headway.pretrain.energy.counter import Sampler, Unmeasured
from headway.pretrain.energy.nvml import Integral, NvmlEnergy, NvmlPower, open_nvml, pci_address

CUDA = torch.device("cuda", 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_without_a_driver():
    pytest.importorskip("pynvml")
    with pytest.raises(Unmeasured, match="NVML: NVML Shared Library Not Found"):
        open_nvml(CUDA)
    with pytest.raises(Unmeasured, match="the device is cpu"):
        open_nvml(torch.device("cpu"))


def test_power_is_integrated_as_numpy_does_it():
    draw = np.random.default_rng(0)
    t = np.cumsum(draw.uniform(0.05, 0.15, 200))
    watts = draw.uniform(60, 700, 200)
    integral = Integral()
    integral.begin(t[0], watts[0])
    for when, power in zip(t[1:], watts[1:], strict=True):
        integral.add(when, power)
    assert integral.joules == pytest.approx(np.trapezoid(watts, t), rel=1e-12)
    assert integral.until(t[-1] + 2) == pytest.approx(integral.joules + 2 * watts[-1], rel=1e-12)
    assert integral.until(t[-1] - 1) == integral.joules


def test_the_counter_is_in_millijoules():
    readings = iter([1_000_000, 1_002_500])
    counter = NvmlEnergy(lambda: next(readings), "a GPU")
    assert counter.joules() == 2.5
    assert counter.source == "NVML energy counter of a GPU"


def test_power_readings_are_taken_on_a_thread():
    counter = NvmlPower(lambda: 250_000, "a GPU")
    begun = time.monotonic()
    first = counter.joules()
    again, passed = counter.joules(), time.monotonic() - begun
    counter.close()
    assert 0 <= first <= again
    assert again - first <= 250 * passed * (1 + 1e-9)


def test_a_gpu_that_falls_off_the_bus_is_told():
    pynvml = pytest.importorskip("pynvml")

    def lost():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    counter = NvmlEnergy(lambda: 0, "a GPU")
    counter._read = lost
    with pytest.raises(Unmeasured, match="NVML: GPU is lost"):
        counter.joules()


def test_a_sampler_ends():
    calls = []
    sampler = Sampler(0.001, lambda: calls.append(1))
    while not calls:
        pass
    sampler.close()
    assert not sampler._thread.is_alive()


def test_addresses_are_nvmls():
    class Properties:
        pci_domain_id, pci_bus_id, pci_device_id = 0, 0x3B, 0

    assert pci_address(Properties) == "00000000:3B:00.0"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_gpu():
    """Work takes energy, and less than twice the most that a board may draw."""
    counter = open_nvml(CUDA)
    begun, x = time.monotonic(), torch.randn(4096, 4096, device=CUDA)
    while time.monotonic() - begun < 1:
        x = (x @ x).tanh()
        torch.cuda.synchronize()
    joules, seconds = counter.joules(), time.monotonic() - begun
    counter.close()
    assert 0 < joules < 2 * 1200 * seconds
