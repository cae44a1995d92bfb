"""Energy of an NVIDIA GPU by NVML: its own counter, or power readings integrated where it has none (before Volta).

W is in watts, t in seconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from headway.pretrain.energy.counter import Counter, Sampler, Unmeasured

OFTEN = 0.1
"""Seconds between power readings; the driver renews them at some 10 to 50 Hz."""


class Integral:
    """Trapezoids under power readings; what came after the last reading counts with that reading's power."""

    def __init__(self) -> None:
        self.joules, self._last = 0.0, (0.0, 0.0)

    def begin(self, t: float, watts: float) -> None:
        self._last = t, watts

    def add(self, t: float, watts: float) -> None:
        """The reading at a time that is not before the last."""
        before, was = self._last
        self.joules += (t - before) * (was + watts) / 2
        self._last = t, watts

    def until(self, t: float) -> float:
        """Joules up to a time after the last reading."""
        before, was = self._last
        return self.joules + max(0.0, t - before) * was


class NvmlEnergy:
    """The GPU's own counter."""

    estimate = False

    def __init__(self, millijoules: Callable[[], int], name: str) -> None:
        self._read, self._begun = millijoules, millijoules()
        self.source = f"NVML energy counter of {name}"

    def joules(self) -> float:
        return (_told(self._read) - self._begun) / 1e3

    def close(self) -> None: ...


class NvmlPower:
    """Power readings, taken on a thread of their own."""

    estimate = False

    def __init__(self, milliwatts: Callable[[], int], name: str) -> None:
        self._read, self._lock, self._sum = milliwatts, threading.Lock(), Integral()
        self._trouble: Unmeasured | None = None
        self._sum.begin(time.monotonic(), milliwatts() / 1e3)
        self.source = f"NVML power of {name}, read every {OFTEN:g} s"
        self._sampler = Sampler(OFTEN, self._sample)

    def _sample(self) -> None:
        try:
            watts = _told(self._read) / 1e3
        except Unmeasured as error:
            self._trouble = error
            return
        with self._lock:
            self._sum.add(time.monotonic(), watts)

    def joules(self) -> float:
        if self._trouble:
            raise self._trouble
        with self._lock:
            return self._sum.until(time.monotonic())

    def close(self) -> None:
        self._sampler.close()


def open_nvml(device: torch.device) -> Counter:
    """The counter of a CUDA device.

    Raises:
        Unmeasured: no NVML, no driver, or a GPU that tells neither energy nor power.
    """
    try:
        import pynvml
    except ImportError:
        raise Unmeasured("nvidia-ml-py is not installed (pip install 'headway[gpu]')") from None
    if device.type != "cuda":
        raise Unmeasured(f"NVML measures NVIDIA's GPUs, and the device is {device.type}")
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByPciBusId(pci_address(torch.cuda.get_device_properties(device)))
        name = pynvml.nvmlDeviceGetName(handle)
        try:
            return NvmlEnergy(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle), name)
        except pynvml.NVMLError_NotSupported:
            return NvmlPower(lambda: pynvml.nvmlDeviceGetPowerUsage(handle), name)
    except pynvml.NVMLError as error:
        raise Unmeasured(f"NVML: {error}") from None


def pci_address(properties: Any) -> str:
    """How NVML names the GPU that torch numbers, whatever CUDA_VISIBLE_DEVICES hides; of a MIG slice its GPU."""
    p = properties
    return f"{p.pci_domain_id:08X}:{p.pci_bus_id:02X}:{p.pci_device_id:02X}.0"


def _told(read: Callable[[], int]) -> int:
    """A reading; what NVML raises becomes Unmeasured."""
    import pynvml

    try:
        return read()
    except pynvml.NVMLError as error:
        raise Unmeasured(f"NVML: {error}") from None
