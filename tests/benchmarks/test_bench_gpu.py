"""The benchmark of kernels on a GPU, as far as it goes without one: what it says, computes of times, and compares."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from headway.kernels.triton.targets import TARGETS
from headway.tests.benchmarks import bench_gpu
from headway.tests.kernels.triton.finding import find_triton

needs_triton = pytest.mark.skipif(
    not find_triton(), reason="Triton is neither installed nor among the oracles"
)


def test_without_a_gpu_it_says_so_and_ends_well(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_gpu.main() == 0
    assert capsys.readouterr().out == "no GPU that PyTorch can use: nothing is measured\n"


@needs_triton
def test_a_line_says_what_a_kernel_reaches():
    """RMSNorm and LayerNorm of a residual sum: each reads and writes two tensors of bf16."""
    bytes_moved = 2 * 4 * 8192 * 768 * 2
    seconds = 2 * bytes_moved / TARGETS["sm_90a"].bandwidth  # half of the bandwidth
    lines = list(
        bench_gpu.kernels("norm", torch.device("meta"), TARGETS["sm_90a"], lambda launch: seconds / 2)
    )
    assert len(lines) == 6, "two kernels at three sizes"
    words = lines[0].split()
    assert words[0] == "norm_forward"
    found = dict(zip(words[5::2], words[4::2], strict=False))
    assert float(found["ms"]) == pytest.approx(seconds / 2 * 1e3, abs=1e-3)
    # Beside them every program reads weights, of LayerNorm biases too, for its two rows: an eighth and a quarter.
    assert float(found["GB/s"]) == pytest.approx(1.1875 * bytes_moved / seconds / 1e9, rel=1e-2)
    assert "50% of roofline" in lines[0]


def race(**theirs):
    """Ours finds ones."""
    return SimpleNamespace(ours=lambda: [torch.ones(3)], theirs=theirs, alike=True)


def test_steps_take_turns_and_medians_are_compared():
    them = race(eager=lambda: [torch.full((3,), 1.01)])
    order = []

    def clock(step):
        order.append("ours" if step is them.ours else "theirs")
        return {"ours": 2.0, "theirs": 3.0}[order[-1]] + (len(order) <= 4) * 100

    (line,) = bench_gpu.race_lines(them, 2, clock)
    assert line == "ours  2000.000 ms, eager           3000.000 ms, ratio 1.50x"
    assert order == ["theirs", "ours", "ours", "theirs"] * 2


def test_what_finds_something_else_is_no_rival():
    with pytest.raises(AssertionError, match=r"eager: result 0 is 0\.1 from ours"):
        list(bench_gpu.race_lines(race(eager=lambda: [torch.full((3,), 1.1)]), 1, lambda step: 1.0))


def test_a_rival_that_cannot_is_told():
    def cannot():
        raise NotImplementedError("not on this GPU")

    told, compared = bench_gpu.race_lines(
        race(flash=cannot, eager=lambda: [torch.ones(3)]), 1, lambda step: 1.0
    )
    assert told == "flash: cannot, not on this GPU"
    assert compared.endswith("ratio 1.00x")
