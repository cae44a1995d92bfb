"""`headway kernels`: what it measures, keeps and shows, and what it says where there is no GPU."""

import pytest
import torch
from typer.testing import CliRunner

from headway.kernels.triton import tuning
from headway.launch import kernels
from headway.launch.cli import app, explain
from headway.pretrain.errors import JobError
from headway.tests.kernels.triton.finding import find_triton

needs_triton = pytest.mark.skipif(
    not find_triton(), reason="Triton is neither installed nor among the oracles"
)


def call(*arguments: str):
    return CliRunner().invoke(app, ["kernels", *arguments])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def gpu(folder, monkeypatch):
    """A GPU by name; its kernels are recorded alone, for there is none."""
    monkeypatch.setattr(kernels, "_gpu", lambda: torch.device("meta"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU of a test")


def test_without_a_gpu_it_says_what_is_missing(folder, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert explain(call("tune", "norm").exception) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        "headway: headway kernels tune: kernels are measured where they run, and this machine lacks"
    )
    assert "a GPU that PyTorch can use" in said
    assert list(folder.iterdir()) == []


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(kernels.MissingError, match="lacks Triton, which PyTorch's builds for GPUs bring"):
        kernels.tune([], None)


def test_an_unknown_op_is_named_with_the_nearest():
    with pytest.raises(
        JobError, match=r"OP = 'nrom': must be one of .*, norm, .* Nearest legal choice: norm"
    ):
        kernels.tune(["nrom"], None)


@needs_triton
def test_an_unknown_size_is_named_with_the_nearest(gpu):
    with pytest.raises(
        JobError, match=r"--size = '8192 x 768': must be one of .* Nearest legal choice: 8,192 x 768"
    ):
        kernels.tune(["norm", "glu"], "8192 x 768")


@needs_triton
def test_what_was_measured_is_told_kept_and_shown(gpu, folder, capsys):
    measure = lambda launch: 1.0 - 0.25 * launch.choice.number * ("forward" in launch.name)  # noqa: E731
    kernels.tune(["norm", "glu"], "8,192 x 768", measure)
    said = capsys.readouterr().out
    assert f"kept in {folder / 'kernels.json'}" in said
    forward, backward = (
        next(line for line in said.splitlines() if name in line) for name in ("forward", "backward")
    )
    assert forward.split()[-2:] == ["1500.000", "25%"]
    assert "the default" in backward
    kept = tuning.known()["GPU of a test"]
    assert set(kept) == {"norm_forward width=1024", "norm_backward width=1024"}
    assert kept["norm_forward width=1024"]["num_warps"] < kept["norm_backward width=1024"]["num_warps"]
    shown = call("show").output
    assert "norm_forward width=1024" in shown
    assert all(product in shown for product in ("A100 SXM 80 GB", "H100 SXM", "B200", "MI300X"))


def test_show_says_what_is_here(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lines = call("show").output.splitlines()
    assert lines[0] == "GPU: none that PyTorch can use"
    assert any("nothing was measured yet" in line for line in lines)
