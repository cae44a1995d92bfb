"""Optimizers that look at whole matrices, with engines that shard state: where nothing is cut, they draw the curve."""

import pytest

from headway.parallel.engines.capabilities import check
from headway.parallel.mesh import Layout
from headway.pretrain.errors import JobError
from headway.tests.parallel.engines.beside import prove_engine
from headway.tests.parallel.family_cases import job_of

matrix = pytest.mark.matrix
OPTIMIZERS = [("muon", "gpt"), ("lamb", "bert"), ("adafactor", "t5")]
LAYOUTS = {
    "deepspeed": {"engine": "deepspeed"},
    "deepspeed, replicate": {"engine": "deepspeed", "replicate": 2},
    "megatron": {"engine": "megatron"},
    "megatron, replicate": {"engine": "megatron", "replicate": 2},
}


@matrix
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("optimizer", "name"), OPTIMIZERS)
def test_whole_state_is_moved_as_in_one_process(pool, optimizer, name, layout):
    prove_engine(pool, [name], LAYOUTS[layout], {"optimizer": {"name": optimizer}})


@pytest.mark.parametrize(
    "parallel",
    [
        {"engine": "deepspeed", "deepspeed": {"zero": 1}},
        {"engine": "deepspeed", "shard": 2},
        {"engine": "megatron", "megatron": {"distributed_optimizer": True}},
        {"engine": "megatron", "tensor": 2},
    ],
)
def test_state_that_is_cut_is_refused(parallel):
    job = job_of("gpt", parallel, 4, 12, {"optimizer": {"name": "muon"}}, "fp32")
    axes = {axis: parallel.get(axis, 1) for axis in ("shard", "tensor")}
    with pytest.raises(JobError, match=r"parallel\.engine = native"):
        check(job, Layout(**axes), "cpu")
