"""On a GPU: the curves of the CPU in every precision, layouts whose ranks share the device, generated code, memory.

    make gpu

Ranks share the device and meet through NCCL (see `pool`): every layout's own calls, at no speed worth measuring.
"""

import gc

import pytest
import torch

from headway.parallel import mesh
from headway.parallel.engines.native import NativeEngine
from headway.parallel.planner.describe import describe
from headway.parallel.planner.memory import peak
from headway.pretrain.device import choose_precision
from headway.pretrain.objectives import build_objective
from headway.tests.parallel import memory_cases
from headway.tests.parallel import test_resume as resume
from headway.tests.parallel.family_cases import CASES, merged
from headway.tests.parallel.pool import Pool
from headway.tests.parallel.proof import STEPS, Curve, Running, alone, compare, curves, prove, ranks_of
from headway.tests.parallel.test_recompute import SETTINGS

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = "cuda:0"
DEEP = {"model": {"heads": 4, "layers": 4}}
WIDE = {"model": {"hidden": 64, "heads": 4, "ffn": 128}}
FAMILIES = ("gpt", "bert", "t5", "vit", "experts")


def curve(name, more=None, **settings):
    """A case's curve on the GPU."""
    return Curve(*curves(0, 1, {}, [name], STEPS, more=more, device=DEVICE, **settings)[name])


@pytest.mark.parametrize("name", CASES)
def test_the_curve_of_the_cpu_in_fp64(name):
    """Weights, dropout and routing come from the same counters; sums differ in order alone."""
    compare(name, curve(name), alone(name))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_narrower_precisions_stay_near(name, precision):
    compare(name, curve(name, precision=precision), alone(name), precision)


@pytest.mark.parametrize("name", ["gpt", "experts"])
def test_fp8_stays_near(name):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no row-wise scaled products before Hopper")
    more = merged(WIDE, {"model": {"experts": {"ffn": 32}}}) if name == "experts" else WIDE
    compare(name, curve(name, more, precision="fp8"), alone(name, more), "fp8")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_generated_code_draws_the_curve(name, precision):
    torch.compiler.reset()
    compare(name, curve(name, WIDE, precision=precision, compiled=True), alone(name, WIDE), precision)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["gpt", "t5", "experts"])
def test_recomputation_and_offload_draw_the_curve(name, setting):
    running = Running(name, 0, 1, SETTINGS[setting], device=DEVICE)
    results = [running.step(step) for step in range(STEPS)]
    assert [r.loss for r in results] == pytest.approx(alone(name).losses, rel=1e-9)
    assert [r.grad_norm for r in results] == pytest.approx(alone(name).norms, rel=1e-9)


@pytest.fixture(scope="module")
def ranks():
    pool = Pool(backend="nccl")
    yield pool
    pool.close()


LAYOUTS = [
    {"replicate": 2, "shard": 1},
    {"shard": 2},
    {"tensor": 2},
    {"tensor": 2, "shard": 2},
    {"context": 2},
    {"context": 2, "context_method": "ulysses"},
    {"expert": 2, "shard": 2},
    {"pipeline": 2, "micro_batch": 3},
    {"pipeline": 2, "micro_batch": 3, "schedule": "interleaved_1f1b"},
    {"tensor": 2, "pipeline": 2, "micro_batch": 3},
    {"tensor": 2, "context": 2},
    {"tensor": 2, "context": 2, "pipeline": 2, "micro_batch": 3},
]


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_layouts_draw_the_curve(ranks, parallel):
    names = ["experts"] if "expert" in parallel else ["gpt", "t5"]
    prove(ranks, names, {"shard": 1} | parallel, DEEP, device=DEVICE)


@pytest.mark.parametrize(
    ("here", "there"),
    [("tensor 2 x shard 2 x replicate 2", "replicas 3"), ("shards of replicas 4", "pipeline 2")],
)
def test_a_run_goes_on_at_another_layout(ranks, tmp_path, here, there):
    expected = resume.straight()
    first, rest = expected[: resume.FIRST], expected[resume.FIRST :]
    for body, layout, those in ((resume.begun, here, first), (resume.ended, there, rest)):
        settings = {"parallel": resume.LAYOUTS[layout], "folder": str(tmp_path), "device": DEVICE}
        for found in ranks(body, ranks=ranks_of(resume.LAYOUTS[layout]), timeout=600, **settings):
            resume.same(found, those)


@pytest.mark.parametrize("name", memory_cases.CASES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_memory_of_a_step_is_what_the_formulas_say(name, precision, recompute):
    """The allocator's peak, above what is there when no step runs, within 5%."""
    job = memory_cases.job_of(name, {"recompute": recompute}, precision, hidden=512, heads=8)
    inputs = memory_cases.inputs_of(job)
    here = mesh.start(job, mesh.Layout(), 0, 1, 0, torch.device(DEVICE), "nccl")
    for _ in range(2):  # libraries keep what they first took as workspace
        gc.collect()
        before = torch.cuda.memory_allocated()
        objective = build_objective(job, inputs, device="meta")
        engine = NativeEngine(job, objective, here, precision=precision, compiled=False)
        batch = {key: value.to(DEVICE) for key, value in memory_cases.batch_of(job).items()}
        engine.train_step(batch, 0)
        torch.cuda.reset_peak_memory_stats()
        engine.train_step(batch, 1)
        found = torch.cuda.max_memory_allocated() - before
        del engine, objective
    run = describe(job, inputs, mesh.Layout(), 0, precision=precision, device="cuda", compiled=False)
    assert found == pytest.approx(peak(run).bytes, rel=0.05)


def test_auto_is_bf16():
    assert choose_precision("auto", torch.device(DEVICE), hidden=64, rows=64)[0] in ("bf16", "fp16")
