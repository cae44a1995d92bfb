"""Where Triton's kernels compute, and who is told that they cannot."""

import pytest
import torch

from headway.kernels import fused
from headway.launch.assemble import choose_kernels
from headway.pretrain.config import Job
from headway.pretrain.errors import JobError


@pytest.fixture(autouse=True)
def as_before():
    yield
    fused.prefer("auto")


def test_a_cpu_computes_by_pytorch_unless_triton_interprets(monkeypatch):
    x = torch.ones(2)
    assert not fused.fused(x)
    fused.prefer("triton")
    assert not fused.fused(x)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(fused, "_installed", lambda: True)
    assert fused.fused(x, None, torch.nn.Parameter(x))
    assert not fused.fused(x.double())
    assert not fused.fused(x, x.as_subclass(Spread))
    for choice in ("auto", "torch"):
        fused.prefer(choice)
        assert not fused.fused(x)


def test_what_is_traced_is_left_to_the_compiler(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(fused, "_installed", lambda: True)
    fused.prefer("triton")
    assert not torch.compile(fused.fused, backend="eager", fullgraph=True)(torch.ones(2))


def test_a_machine_without_triton_is_told(monkeypatch):
    monkeypatch.setattr(fused, "_installed", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert fused.unavailable("cuda") == "it needs Triton, which is not installed (pip install triton)"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert fused.unavailable("cuda") is None  # planned for another machine


@pytest.mark.parametrize(
    ("settings", "precision", "rule"),
    [
        ({}, "fp32", "train.kernels = 'triton': it runs on cuda, not on cpu"),
        ({}, "fp64", "take fp32, bf16 and fp16, not precision fp64"),
        ({"compile": True}, "fp32", "train.compile must be false"),
    ],
)
def test_an_explicit_wish_is_refused_by_name(settings, precision, rule):
    job = Job.model_validate({"train": {"kernels": "triton", **settings}})
    with pytest.raises(JobError, match=rule):
        choose_kernels(job, torch.device("cpu"), precision)


class Spread(torch.Tensor):
    """As a tensor that is spread over ranks, of a class of its own."""
