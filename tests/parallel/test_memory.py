"""Peak bytes of a step, counted tensor by tensor, against the formulas of `parallel/planner`: within 5%."""

import pytest
import torch

from headway.kernels.attention.choose import choose
from headway.parallel import mesh
from headway.parallel.engines.native import NativeEngine
from headway.parallel.planner.memory import peak
from headway.parallel.planner.places import Run
from headway.pretrain.config import Job
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.objectives import build_objective
from headway.tests.parallel.tensor_bytes import TensorBytes

VOCAB, ROWS = 300, 4
POLICIES = ("none", "products", "attention", "full")
LLAMA = {"activation": "swiglu", "norm": "rmsnorm", "bias": False, "positions": "rotary", "kv_heads": 2}
DROPOUT = {"dropout": 0.1, "attention": {"dropout": 0.1}}
BLOCKS_DROPOUT = {"dropout": 0.1, "attention": {"dropout": 0.1, "kernel": "blocks"}}
REFERENCE = {"attention": {"kernel": "reference"}}

FAST = choose("dense").name
GPTS = {  # model, precision, what computes attention
    "gelu": ({}, "fp32", FAST),
    "swiglu": (LLAMA, "fp32", FAST),
    "gelu bf16": ({}, "bf16", FAST),
    "swiglu bf16": (LLAMA, "bf16", FAST),
    "sdpa": ({"attention": {"kernel": "sdpa"}}, "fp32", "sdpa"),
    "sdpa, swiglu": (LLAMA | {"attention": {"kernel": "sdpa"}}, "fp32", "sdpa"),
    "blocks bf16": ({"attention": {"kernel": "blocks"}}, "bf16", "blocks"),
    "blocks, swiglu bf16": (LLAMA | {"attention": {"kernel": "blocks"}}, "bf16", "blocks"),
    "blocks, dropout": (BLOCKS_DROPOUT, "fp32", "blocks"),
    "blocks, dropout bf16": (BLOCKS_DROPOUT, "bf16", "blocks"),
    "sdpa bf16": ({"attention": {"kernel": "sdpa"}}, "bf16", "sdpa"),
    "dropout": (DROPOUT, "fp32", FAST),
    "dropout bf16": (DROPOUT, "bf16", FAST),
    "reference": (REFERENCE, "fp32", "reference"),
    "reference bf16": (REFERENCE, "bf16", "reference"),
    "reference, dropout": ({"dropout": 0.1, "attention": {"kernel": "reference", "dropout": 0.1}}, "fp32", "reference"),
    "blocks": ({"attention": {"kernel": "blocks"}}, "fp32", "blocks"),
    "relu2, layer scale": ({"activation": "relu2", "layer_scale": 0.1}, "fp32", FAST),
    "post-norm, untied": ({"norm_position": "post", "tied": False}, "fp32", FAST),
    "affine": ({"norm": "affine"}, "fp32", FAST),
    "experts": ({"experts": {"count": 4}}, "fp32", FAST),
    "fp64": ({}, "fp64", "sdpa"),
}  # fmt: skip
QUICK = ("swiglu bf16",)


def job_of(model, parallel, precision="fp32", ranks=1):
    tree = {
        "model": {"layers": 4, "hidden": 128, "heads": 4} | model,
        "data": {"seq_len": 128, "tokenizer": {"kind": "bytes"}},
        "parallel": parallel,
        "train": {"steps": 4, "global_batch": ROWS * ranks, "compile": False},
        "schedule": {"warmup": 2},
        "precision": precision,
    }
    return Job.model_validate(tree)


def engine_of(job, rank=0, world=1, compiled=False):
    layout = mesh.lay_out(job.parallel, world)
    here = mesh.start(job, layout, rank, world, rank, torch.device("cpu"), "gloo")
    objective = build_objective(job, Inputs(VOCAB, job.data.seq_len), device="meta")
    return NativeEngine(job, objective, here, precision=job.precision, compiled=compiled)


def batch_of(job):
    """A rank's rows of random tokens."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (ROWS, job.data.seq_len + 1), generator=draw)
    rows = torch.arange(ROWS)
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "slot": rows,
        "sample": rows,
    }


def measured(job, rank=0, world=1, elsewhere=lambda: 0):
    """The tracker after a step; it has seen the engine's making, and another step before."""
    with TensorBytes(elsewhere) as tracker:
        engine, batch = engine_of(job, rank, world), batch_of(job)
        engine.train_step(batch, 0)
        tracker.restart()
        engine.train_step(batch, 1)
    return tracker


def predicted(job, kernel, **ranks):
    return peak(Run(job, Inputs(VOCAB, job.data.seq_len), ROWS, kernel, mesh.Layout(**ranks)))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in GPTS])
def test_a_step_takes_the_bytes_of_the_formulas(name, policy):
    model, precision, kernel = GPTS[name]
    job = job_of(model, {"recompute": policy}, precision)
    assert predicted(job, kernel).bytes == pytest.approx(measured(job).peak, rel=0.05)


@pytest.mark.parametrize("name", ["gelu", pytest.param("reference", marks=pytest.mark.long)])
def test_what_is_computed_again_is_not_kept(name):
    model, precision, _ = GPTS[name]
    peaks = {policy: measured(job_of(model, {"recompute": policy}, precision)).peak for policy in POLICIES}
    assert peaks["none"] > peaks["products"] > peaks["full"]
    assert peaks["none"] > peaks["attention"] > peaks["full"]


@pytest.mark.long
@pytest.mark.parametrize("length", [256, 384])
@pytest.mark.parametrize("name", ["gelu", "sdpa", "blocks", "dropout bf16", "blocks, dropout bf16"])
def test_longer_rows_take_the_bytes_of_the_formulas(name, length):
    model, precision, kernel = GPTS[name]
    job = job_of(model, {"recompute": "none"}, precision)
    job = job.model_copy(update={"data": job.data.model_copy(update={"seq_len": length})})
    assert predicted(job, kernel).bytes == pytest.approx(measured(job).peak, rel=0.05)


def peaks_of(rank, world, cases):
    return [measured(job_of(model, parallel, ranks=world), rank, world).peak for model, parallel in cases]


STAGES = {  # ZeRO: no sharding (DDP), stage 2, stage 3
    "replicas": lambda n: {"replicate": n, "shard": 1},
    "stage 2": lambda n: {"shard": n, "reshard": False},
    "stage 3": lambda n: {"shard": n},
}


SOME = [("replicas", "none"), ("stage 3", "full")]
ALL = [(stage, policy) for stage in STAGES for policy in POLICIES]


@pytest.mark.parametrize(
    ("ranks", "keys"),
    [
        (2, SOME[1:]),
        pytest.param(2, ALL, marks=pytest.mark.long),
        pytest.param(4, ALL, marks=pytest.mark.long),
    ],
)
def test_every_zero_stage_takes_the_bytes_of_the_formulas(pool, ranks, keys):
    """Whole recomputation leaves mostly model states, none mostly activations."""
    cases = [({}, STAGES[stage](ranks) | {"recompute": policy}) for stage, policy in keys]
    for found in pool(peaks_of, ranks=ranks, cases=cases, timeout=600):
        for (stage, policy), (model, parallel), bytes_ in zip(keys, cases, found, strict=True):
            job = job_of(model, parallel, ranks=ranks)
            spread = {"replicate": ranks} if stage == "replicas" else {"shard": ranks}
            assert predicted(job, "sdpa", **spread).bytes == pytest.approx(bytes_, rel=0.05), (stage, policy)


def test_the_paper_is_found_in_the_lines():
    """Korthikanti et al. 2022, 4.1: 34 s b h + 5 a s^2 b bytes. Ours, with 2 bytes everywhere and without casts: 32
    beside dropout's 2, and softmax, mask, dropped weights and two masks of causality."""
    from headway.parallel.planner.activations import Place, table, total

    model = job_of({"dropout": 0.1, "attention": {"kernel": "reference", "dropout": 0.1}}, {}).model
    s, b, h, a = 128, 3, 128, 4
    terms = table(Place(model, b, s, kernel="reference", wide=2, narrow=2))
    lines = total(term for term in terms if term.part != "attention" and "statistics" not in term.name)
    assert lines == s * b * h * 34
    square = total(term for term in terms if "paper" in term.name and term.part == "attention")
    assert square == 5 * a * s**2 * b
