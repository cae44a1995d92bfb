"""Jobs of every family large enough that tensors are what a step's bytes are made of, and random batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headway.kernels.cross_entropy import IGNORE
from headway.parallel import mesh
from headway.parallel.engines.native import NativeEngine
from headway.pretrain.config import Job
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.objectives import build_objective
from headway.tests.parallel.tensor_bytes import TensorBytes

VOCAB, ROWS, LENGTH, TARGET = 300, 4, 128, 96
BERT = {
    "model": {"family": "bert", "norm_position": "post", "embedding_norm": True, "segments": 2, "pooler": True,
              "activation": "gelu", "init": {"scheme": "bert"}},
    "objective": {"name": "masked", "masking": {"pairs": "next"}},
}  # fmt: skip
T5 = {
    "model": {"family": "t5", "layers": 2, "decoder_layers": 2, "norm": "rmsnorm", "positions": "relative",
              "bias": False, "activation": "relu", "attention": {"scale": 1.0}, "init": {"scheme": "t5"}},
    "objective": {"name": "spans"},
}  # fmt: skip
VIT = {
    "model": {"family": "vit", "activation": "gelu", "vision": {"patch": 2}, "init": {"scheme": "vit"}},
    "data": {"images": {"size": 22}},
    "objective": {"name": "classify"},
}
CASES: dict[str, dict[str, Any]] = {
    "gpt": {},
    "bert": BERT,
    "t5": T5,
    "vit": VIT,
    "mae": VIT | {"objective": {"name": "mae", "mae": {"layers": 2, "hidden": 64, "heads": 2}}},
}


def job_of(
    name: str,
    parallel: dict[str, Any],
    precision: str = "fp32",
    ranks: int = 1,
    rows: int = ROWS,
    **model: Any,
) -> Job:
    """A case: four blocks of width 128, without dropout; `ranks` that read different rows, `rows` each."""
    case = CASES[name]
    tree: dict[str, Any] = {
        "model": {"layers": 4, "hidden": 128, "heads": 4} | case.get("model", {}) | model,
        "data": {"seq_len": LENGTH, "tokenizer": {"kind": "bytes"}} | case.get("data", {}),
        "objective": case.get("objective", {}),
        "parallel": parallel,
        "train": {"steps": 4, "global_batch": rows * ranks, "compile": False},
        "schedule": {"warmup": 2},
        "precision": precision,
    }
    return Job.model_validate(tree)


def inputs_of(job: Job) -> Inputs:
    if job.model.family == "vit":
        classes = 10 if job.objective.name == "classify" else 0
        return Inputs(length=job.row_tokens, image=job.data.images.size, channels=3, classes=classes)
    return Inputs(VOCAB, job.data.seq_len, TARGET if job.model.family == "t5" else 0)


def batch_of(job: Job, rows: int = ROWS) -> dict[str, Tensor]:
    """A rank's rows: random tokens, pixels and labels."""
    draw = torch.Generator().manual_seed(0)

    def tokens(length: int, high: int = VOCAB) -> Tensor:
        return torch.randint(0, high, (rows, length), generator=draw)

    number, length = torch.arange(rows), job.data.seq_len
    batch = {"slot": number, "sample": number}
    if job.model.family == "vit":
        return batch | _images(job, rows, draw)
    batch |= {"tokens": tokens(length), "labels": tokens(length)}
    if job.objective.name == "masked":
        hidden = torch.rand(rows, length, generator=draw).argsort(1) < round(
            length * job.objective.masking.rate
        )
        batch["labels"].masked_fill_(~hidden, IGNORE)
        batch |= {"segments": tokens(length, 2), "pair": number % 2}
        batch["documents"] = (torch.arange(length) < length - number[:, None]).int() - 1
    if job.model.family == "t5":
        batch |= {"targets": tokens(TARGET), "labels": tokens(TARGET)}
    return batch


def _images(job: Job, rows: int, draw: torch.Generator) -> dict[str, Tensor]:
    size = job.data.images.size
    batch = {"pixels": torch.rand(rows, 3, size, size, generator=draw)}
    if job.objective.name == "classify":
        return batch | {"labels": torch.arange(rows) % 10}
    patches = (size // job.model.vision.patch) ** 2
    seen = max(1, int(patches * (1 - job.objective.mae.rate)))
    visible = torch.rand(rows, patches, generator=draw).argsort(1)[:, :seen].sort(1).values
    return batch | {
        "visible": visible,
        "scored": torch.ones(rows, patches, dtype=torch.bool).scatter_(1, visible, False),
    }


def measured(job: Job, rank: int = 0, world: int = 1, rows: int = ROWS) -> TensorBytes:
    """The tracker after a step; it has seen the engine's making, and another step before."""
    layout = mesh.lay_out(job.parallel, world)
    here = mesh.start(job, layout, rank, world, rank, torch.device("cpu"), "gloo")
    with TensorBytes() as tracker:
        objective = build_objective(job, inputs_of(job), device="meta")
        engine = NativeEngine(job, objective, here, precision=job.precision, compiled=False)
        batch = batch_of(job, rows)
        engine.train_step(batch, 0)
        tracker.restart()
        engine.train_step(batch, 1)
    return tracker
