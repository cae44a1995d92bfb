"""Choices of device, backend and precision, and the rates that MFU is held against."""

import json
import os
from pathlib import Path

import pytest
import torch

from headway.pretrain import device as devices
from headway.pretrain.device import (
    choose_backend,
    choose_device,
    choose_precision,
    compiler_available,
    matmul_rate,
    peak_rate,
)
from headway.pretrain.errors import JobError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    devices.device_name.cache_clear()
    return tmp_path / "cache"


def pretend_gpu(monkeypatch, name: str, count: int = 1, bf16: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)


def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", local_rank=3) == CPU
    assert choose_device("cpu") == CPU
    with pytest.raises(JobError, match=r"parallel\.device = 'cuda'.*sees no CUDA.*Nearest legal choice: cpu"):
        choose_device("cuda")


def test_each_local_rank_gets_a_gpu_of_its_own_or_an_error(monkeypatch):
    pretend_gpu(monkeypatch, "NVIDIA H100 PCIe", count=2)
    assert [choose_device("auto", rank).index for rank in (0, 1)] == [0, 1]
    assert choose_device("cpu", 0) == CPU
    with pytest.raises(JobError, match=r"process 2 finds 2.*at most 2 processes"):
        choose_device("auto", 2)


def test_a_rank_that_is_shown_one_gpu_has_that_one(monkeypatch):
    pretend_gpu(monkeypatch, "NVIDIA H100 PCIe", count=1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(JobError, match="process 1 finds 1"):
        choose_device("auto", 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # srun --gpus-per-task=1
    assert choose_device("auto", 1) == GPU


def test_backend_follows_the_device(monkeypatch):
    assert choose_backend(CPU) == "gloo"
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    assert choose_backend(GPU) == "nccl"
    assert choose_backend(GPU, "gloo") == "gloo"
    with pytest.raises(JobError, match=r"parallel\.backend = 'nccl'.*the device is cpu.*gloo"):
        choose_backend(CPU, "nccl")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert choose_backend(GPU) == "gloo"
    with pytest.raises(JobError, match="built without NCCL"):
        choose_backend(GPU, "nccl")


# Device names as the driver reports them, and dense bf16 (V100, T4: fp16) peaks in TFLOP/s.
@pytest.mark.parametrize(
    ("name", "kind", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("A100-SXM4-40GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "fp16", 312),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla T4", "fp16", 65),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
    ],
)
def test_known_gpus_have_their_dense_peak(monkeypatch, name, kind, peak):
    pretend_gpu(monkeypatch, name)
    rate, source = peak_rate(GPU, devices.PRECISIONS[kind])
    assert rate == pytest.approx(peak * 1e12)
    assert "dense" in source
    assert name in source


def test_fp32_that_may_use_tf32_is_held_against_tf32(monkeypatch):
    pretend_gpu(monkeypatch, "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_rate(GPU, torch.float32)[0] == pytest.approx(156e12)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",  # a slice
        "NVIDIA A10G",  # another chip than A10
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "Something of 2031",
    ],
)
def test_what_no_data_sheet_names_is_measured(monkeypatch, name):
    pretend_gpu(monkeypatch, name)
    monkeypatch.setattr(devices, "matmul_rate", lambda device, dtype: 1.5e12)
    rate, source = peak_rate(GPU, torch.bfloat16)
    assert (rate, source.split(":")[0]) == (1.5e12, "measured")


def test_the_table_holds_dense_peaks_only():
    """Dense 16-bit products run at twice the rate of TF32 on all of these; a sparse number would be 4x."""
    for pattern, peaks in devices._PEAKS:
        if "tf32" in peaks:
            assert peaks["bf16"] == peaks["fp16"]
            assert 1.95 < peaks["bf16"] / peaks["tf32"] < 2.06, pattern


def test_matmul_rate_counts_two_operations_a_product_and_is_measured_once(monkeypatch, cache):
    def pretended(function, device):
        n = function.args[0].shape[0]
        return 2 * n**3 / (1e11 if n < 2048 else 3e11)  # larger products run faster: the best one counts

    monkeypatch.setattr(devices, "_seconds", pretended)
    assert matmul_rate(CPU, torch.float32) == pytest.approx(3e11)

    def fail(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(devices, "_seconds", fail)
    assert matmul_rate(CPU, torch.float32) == pytest.approx(3e11)
    (key,) = json.loads((cache / "rates.json").read_text())
    assert "fp32" in key
    assert torch.__version__ in key
    assert "thread" in key
    with pytest.raises(AssertionError, match="measured again"):
        matmul_rate(CPU, torch.bfloat16)


def test_what_was_measured_on_a_busy_host_is_forgotten(monkeypatch, cache):
    monkeypatch.setattr(os, "getloadavg", lambda: (os.cpu_count() + 1.0, 0.0, 0.0))
    monkeypatch.setattr(devices, "_seconds", lambda function, device: 1.0)
    matmul_rate(CPU, torch.float32)
    assert not cache.exists()


def test_matmul_rate_of_this_machine_is_plausible():
    # Between a microcontroller's 1 MFLOP/s and ten of the fastest hosts there are.
    assert 1e6 < matmul_rate(CPU, torch.float32, budget=0.05) < 1e14


@pytest.mark.parametrize("broken", ["not json", "[]", "directory", "file"])
def test_a_broken_cache_costs_time_only(monkeypatch, tmp_path, broken):
    monkeypatch.setattr(devices, "_seconds", lambda function, device: 1.0)
    cache = tmp_path / "cache"
    if broken == "file":
        cache.write_text("")
    else:
        cache.mkdir()
        path = cache / "rates.json"
        path.mkdir() if broken == "directory" else path.write_text(broken)
    assert matmul_rate(CPU, torch.float32) == 2 * 512**3


def test_precision_that_was_asked_for_stays(monkeypatch):
    for name in ("fp32", "bf16", "fp16", "fp64"):
        assert choose_precision(name, CPU, hidden=64, rows=64)[0] == name
    pretend_gpu(monkeypatch, "Tesla V100-SXM2-16GB", bf16=False)
    with pytest.raises(JobError, match=r"precision = 'bf16'.*no bf16 units.*fp16"):
        choose_precision("bf16", GPU, hidden=64, rows=64)


@pytest.mark.parametrize(("bf16", "choice"), [(True, "bf16"), (False, "fp16")])
def test_auto_precision_on_a_gpu_follows_its_units(monkeypatch, bf16, choice):
    pretend_gpu(monkeypatch, "some GPU", bf16=bf16)
    assert choose_precision("auto", GPU, hidden=64, rows=64)[0] == choice


@pytest.mark.parametrize(
    ("fp32", "bf16", "choice"),
    [(1e11, 3e11, "bf16"), (1e11, 1.05e11, "fp32"), (1e11, 1e10, "fp32")],
)
def test_auto_precision_on_a_cpu_takes_what_measured_faster_and_remembers(monkeypatch, fp32, bf16, choice):
    calls = []
    monkeypatch.setattr(
        devices,
        "_linear_rates",
        lambda *shape: calls.append(shape) or {"fp32": fp32, "bf16": bf16, "rows": 512},
    )
    for _ in range(2):
        chosen, reason = choose_precision("auto", CPU, hidden=128, rows=512)
        assert chosen == choice
        assert f"fp32 {fp32 / 1e9:.3g}, bf16 {bf16 / 1e9:.3g} GFLOP/s" in reason
    assert calls == [(512, 128, 512)]


def test_the_measurement_stays_within_its_budget_where_bf16_is_very_slow(monkeypatch):
    spent = []

    def pretended(function, device):
        x, weight, grad = function.args
        rate = 1e8 if grad.dtype == torch.bfloat16 else 1e11
        spent.append(6 * x.shape[0] * weight.numel() / rate)
        return spent[-1]

    monkeypatch.setattr(devices, "_seconds", pretended)
    rates = devices._linear_rates(16384, 256, 1024, budget=0.8)
    assert rates["fp32"] == pytest.approx(1e11)
    assert rates["bf16"] == pytest.approx(1e8)
    # One round of 64 rows takes 1.0 s at 0.1 GFLOP/s; no larger one was begun.
    assert rates["rows"] == 64
    assert sum(spent) < 1.2


def test_the_measurement_reaches_the_shape_of_the_job_where_that_is_cheap(monkeypatch):
    monkeypatch.setattr(devices, "_seconds", lambda function, device: 1e-5)
    assert devices._linear_rates(1000, 32, 64)["rows"] == 1000


def test_a_linear_step_computes_in_the_dtype_it_is_asked_for():
    x, weight = torch.randn(8, 16, requires_grad=True), torch.randn(4, 16, requires_grad=True)
    devices._linear_step(x, weight, torch.randn(8, 4))  # autograd refuses a gradient of another dtype
    devices._linear_step(x, weight, torch.randn(8, 4).bfloat16())


def test_a_compiler_is_only_available_if_it_can_compile(monkeypatch, tmp_path):
    compiler_available.cache_clear()
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert compiler_available() is False
    compiler_available.cache_clear()
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(devices.sysconfig, "get_path", lambda name: str(tmp_path))  # no Python.h there
    assert compiler_available() is False
    compiler_available.cache_clear()
