"""Estimates: names as /proc/cpuinfo and torch spell them, shares of a processor, and the word `estimate`."""

import re

import pytest
import torch

from headway.pretrain.energy import rated
from headway.pretrain.energy.rated import Rated, open_rated, plain_name, rating


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("Intel(R) Xeon(R) Gold 6148 CPU @ 2.40GHz", "Intel Xeon Gold 6148"),
        ("Intel(R) Xeon(R) Platinum 8480+", "Intel Xeon Platinum 8480+"),
        ("Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz", "Intel Xeon E5-2680 v4"),
        ("AMD EPYC 7763 64-Core Processor", "AMD EPYC 7763"),
        ("AMD Ryzen 9 7950X 16-Core Processor", "AMD Ryzen 9 7950X"),
        ("13th Gen Intel(R) Core(TM) i9-13900K", "Intel Core i9-13900K"),
    ],
)
def test_names_of_processors(name, plain):
    assert plain_name(name) == plain
    assert plain in rated._CPUS


def test_a_processor_counts_in_the_share_that_computes():
    watts, words = rating("cpu", "AMD EPYC 7742 64-Core Processor", 32)
    assert watts == 225 / 4
    assert words == "TDP 225 W of AMD EPYC 7742 64-Core Processor x 32 of 128 threads"


def test_a_processor_that_nobody_knows():
    watts, words = rating("cpu", "Intel(R) Xeon(R) Processor", 2)
    assert watts == 8
    assert "2 threads x 4 W" in words
    assert "not known" in words


@pytest.mark.parametrize(
    ("name", "watts"),
    [
        ("NVIDIA H100 80GB HBM3", 700),
        ("NVIDIA H100 PCIe", 350),
        ("NVIDIA H200", 700),
        ("NVIDIA A100-SXM4-80GB", 400),
        ("NVIDIA A100 80GB PCIe", 300),
        ("Tesla V100-SXM2-16GB", 300),
        ("NVIDIA L4", 72),
        ("AMD Instinct MI250X", 280),
    ],
)
def test_gpus(name, watts):
    assert rating("cuda", name, 8) == (watts, f"TDP {watts} W of {name}")


def test_a_gpu_that_nobody_knows_is_rather_too_high():
    watts, words = rating("cuda", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", 8)
    assert watts == max(w for _, w in rated._GPUS)
    assert "tracking.energy.watts" in words


def test_one_pattern_a_gpu():
    names = ["A100 80GB PCIe", "H100 NVL", "H200", "H200 NVL", "L4", "L40", "L40S", "B200", "GB200"]
    assert all(sum(bool(re.fullmatch(pattern, name)) for pattern, _ in rated._GPUS) == 1 for name in names)


def test_power_times_time():
    now = [10.0]
    counter = Rated(250, "TDP 250 W", lambda: now[0])
    now[0] = 14.0
    assert counter.joules() == 1000
    assert counter.estimate
    assert counter.source == "estimate: TDP 250 W"


def test_stated_watts_win():
    counter = open_rated(torch.device("cpu"), 42.5, 2)
    assert counter.watts == 42.5
    assert counter.source == "estimate: 42.5 W a rank, as tracking.energy.watts states"
