"""Compiled blocks where the model itself is spread: each layout against one eager process, in fp64, all that is random
on."""

from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch._dynamo.utils import counters

from headway.launch import assemble
from headway.parallel.engines.capabilities import check
from headway.parallel.mesh import lay_out
from headway.pretrain import device as devices
from headway.pretrain.errors import JobError
from headway.tests.parallel.family_cases import job_of
from headway.tests.parallel.proof import Curve, alone, compare, curves, ranks_of

EVEN = {"model": {"heads": 4}}


def compiled_curve(rank, world, parallel, name, backend):
    """A case's curve from compiled blocks, the number of graphs, and why tracing broke off where it did."""
    torch.compiler.reset()
    counters.clear()
    with patch.object(torch, "compile", partial(torch.compile, backend=backend)):
        found = curves(rank, world, parallel, [name], more=EVEN, compiled=True)[name]
    return found, counters["stats"]["unique_graphs"], list(counters["graph_break"])


def draw(pool, parallel, name, backend="inductor"):
    """Compare a compiled case at a layout with one eager process; returns where tracing broke off on any rank."""
    settings = {"parallel": {"shard": 1} | parallel, "name": name, "backend": backend}
    answers = pool(compiled_curve, ranks=ranks_of(parallel), timeout=1200, **settings)
    for found, graphs, _ in answers:
        assert graphs > 0
        compare(name, Curve(*found), alone(name, EVEN))
    return [why for _, _, breaks in answers for why in breaks]


@pytest.mark.matrix
def test_collectives_are_traced(pool):
    """What a block sends along the tensor axis stands in its graph; the matrix has Inductor's code for it."""
    assert not draw(pool, {"tensor": 2}, "bert", backend="aot_eager")


LAYOUTS = {
    "tensor": ({"tensor": 2}, "bert"),
    "tensor, whole sequences": ({"tensor": 2, "sequence": False}, "experts"),
    "ring": ({"context": 2}, "bert"),
    "ulysses": ({"context": 2, "context_method": "ulysses"}, "t5"),
    "1f1b": ({"pipeline": 2, "micro_batch": 3}, "bert"),
    "interleaved": ({"pipeline": 2, "schedule": "interleaved_1f1b", "micro_batch": 3}, "experts"),
    "expert": ({"expert": 2, "shard": 2}, "roberta"),
    "tensor x context": ({"tensor": 2, "context": 2}, "bert"),
    "tensor x pipeline": ({"tensor": 2, "pipeline": 2, "micro_batch": 3}, "bert"),
}


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_blocks_draw_the_curve_of_one_eager_process(pool, layout):
    draw(pool, *LAYOUTS[layout])


def chosen(monkeypatch, ask, **parallel):
    monkeypatch.setattr(devices, "compiler_available", lambda: True)
    job = job_of("bert", {"shard": 1} | parallel, 100, 12, {"model": {"heads": 4, "layers": 4}})
    job = job.model_copy(update={"train": job.train.model_copy(update={"compile": ask})})
    ranks = parallel.get("pipeline", 1) * parallel.get("tensor", 1)
    layout = lay_out(job.parallel, ranks)
    check(job, layout, "cpu")
    return assemble.choose_compile(job, torch.device("cpu"), layout)


def test_auto_compiles_along_one_axis_of_the_model(monkeypatch):
    """Who asks for more gets it."""
    assert chosen(monkeypatch, "auto", tensor=2) == (True, "a compiler is here and the run is long")
    assert chosen(monkeypatch, "auto", pipeline=2)[0]
    assert not chosen(monkeypatch, "auto", tensor=2, pipeline=2)[0]
    assert chosen(monkeypatch, True, tensor=2, pipeline=2)[0]


def test_a_split_backward_is_not_compiled(monkeypatch):
    """`auto` says why; who asks for it is told before ranks meet."""
    compiled, why = chosen(monkeypatch, "auto", pipeline=2, schedule="zbv")
    assert not compiled
    assert "splits the backward" in why
    with pytest.raises(JobError, match=r"train\.compile"):
        chosen(monkeypatch, True, pipeline=2, schedule="zbv")
