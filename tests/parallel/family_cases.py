"""A small job of every family, with samples in memory: what `test_families` and others run at several layouts.

Between them the cases use every optimizer and every option that random numbers, buffers or side losses hang on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from headway.pretrain.config import Job
from headway.pretrain.data.samples import make_keys
from headway.pretrain.data.segments import SegmentPairs
from headway.pretrain.data.specials import Specials
from headway.pretrain.data.text_pairs import TextPairs
from headway.pretrain.data.token_rows import TokenRows
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.objectives import build_objective
from headway.pretrain.objectives.classify import Classifier
from headway.pretrain.objectives.distill.attach import TeacherShape
from headway.pretrain.objectives.soft_classes import SoftClasses
from headway.tests.parallel.distill_cases import STUDENTS

TEXT, LENGTH, TARGET = 50, 16, 14
SPECIALS = Specials(
    vocab=67, separator=0, text=TEXT,
    ids={name: TEXT + i for i, name in enumerate(
        ("cls", "sep", "mask", "pad", "mode_R", "mode_S", "mode_X", "fim_prefix", "fim_middle", "fim_suffix")
    )},
    sentinels=list(range(66, 59, -1)),
)  # fmt: skip
STARTS = np.arange(SPECIALS.vocab) % 3 != 1  # a third of the pieces go on with a word


class Texts:
    """A token store in memory: random documents of 1 to `longest` tokens, each ended by token 0."""

    def __init__(self, seed: int, documents: int = 120, longest: int = 40) -> None:
        draw = np.random.default_rng(seed)
        self._texts = [draw.integers(1, TEXT, n) for n in draw.integers(1, longest + 1, documents)]
        self._flat = np.concatenate([np.append(text, 0) for text in self._texts])
        self._begins = np.cumsum([0] + [len(text) + 1 for text in self._texts])
        self.tokens, self.documents = len(self._flat), documents

    def read(self, start, count):
        return self._flat[start : start + count]

    def boundaries(self, start, stop):
        begins = self._begins
        return begins[(begins >= start) & (begins < stop)]

    def text(self, i, separator):
        return self._texts[i]

    def text_lengths(self, separator):
        return np.array([len(text) for text in self._texts])


class Pictures:
    """Random images of 8 x 8 pixels in 5 classes, mixed with another of them where the job mixes."""

    def __init__(self, mixed: bool) -> None:
        draw = np.random.default_rng(0)
        self.pixels = draw.standard_normal((90, 3, 8, 8)).astype(np.float32)
        self.labels, self.mixed = draw.integers(0, 5, 90), mixed
        self.identity: dict[str, int | str] = {"images": 90}

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, indices, keys):
        rows = {"pixels": self.pixels[indices], "label": self.labels[indices]}
        if not self.mixed:
            return rows
        other, share = keys % 90, (keys % 1000 / 1000).astype(np.float32)
        mixed = (
            share[:, None, None, None] * rows["pixels"]
            + (1 - share[:, None, None, None]) * self.pixels[other]
        )
        return {"pixels": mixed, "label": rows["label"], "partner": self.labels[other], "share": share}


BERT = {
    "model": {"family": "bert", "norm_position": "post", "embedding_norm": True, "segments": 2, "pooler": True,
              "activation": "gelu", "init": {"scheme": "bert"}},
    "objective": {"name": "masked", "masking": {"pairs": "next", "rate": 0.25}},
}  # fmt: skip
T5 = {
    "model": {"family": "t5", "decoder_layers": 3, "norm": "rmsnorm", "positions": "relative", "bias": False,
              "relative_buckets": 8, "relative_distance": 12, "head_dim": 10,
              "attention": {"dropout": 0.2, "scale": 1.0}, "head_scale": 0.2, "init": {"scheme": "t5"}},
    "objective": {"name": "spans"},
}  # fmt: skip
VIT = {
    "model": {"family": "vit", "activation": "gelu", "vision": {"patch": 2}, "init": {"scheme": "vit"}},
    "data": {"images": {"size": 8}},
}

CASES: dict[str, dict[str, Any]] = {
    "gpt": {"model": {"attention": {"dropout": 0.1}}},
    "bert": BERT | {"optimizer": {"name": "lamb"}},
    "albert": {
        "model": BERT["model"] | {"layers": 4, "unique_layers": 2, "embedding_size": 10,
                                  "attention": {"dropout": 0.2}},
        "objective": {"name": "masked", "masking": {"pairs": "order", "unit": "word", "rate": 0.3}},
        "optimizer": {"ema": 0.9, "layer_decay": 0.7},
    },
    "roberta": {
        "model": {"family": "bert", "tied": False, "bias": False, "norm_position": "pre", "pooler": True,
                  "experts": {"count": 4, "pattern": "DE", "routing": "experts", "ffn": 20}},
        "objective": {"name": "masked", "masking": {"unit": "span"}, "z_loss": 1e-3},
        "data": {"documents": "isolate"},
    },
    "mobile": {
        "model": BERT["model"] | {"activation": "relu", "norm": "affine", "ffn": 20, "embedding_size": 10,
                                  "embedding_trigram": True, "bottleneck": {"hidden": 12, "ffns": 3},
                                  "attention": {"dropout": 0.1}, "init": {"scheme": "bert", "std": 0.3}},
        "objective": BERT["objective"],
        "optimizer": {"name": "lamb"},
    },
    "inverted": {
        "model": {"norm_position": "post", "spectral": True, "stochastic_depth": 0.3, "layer_scale": 0.3,
                  "bottleneck": {"hidden": 36, "reads": "outside", "ffns": 2}},
        "data": {"documents": "isolate"},
    },
    "t5": T5 | {"optimizer": {"name": "adafactor"}},
    "ul2": {
        "model": T5["model"] | {"tied": False, "activation": "geglu_tanh", "decoder_layers": 2},
        "objective": {"name": "ul2", "denoisers": [
            {"mode": "R", "rate": 0.2}, {"mode": "S", "rate": 0.0}, {"mode": "X", "rate": 0.5, "mean": 4.0}]},
        "optimizer": {"ema": 0.8},
    },
    "transformer": {
        "model": {"family": "t5", "positions": "sinusoidal", "norm_position": "post", "activation": "relu",
                  "embedding_scale": True, "experts": {"count": 3, "top_k": 1, "pattern": "DE", "bias_rate": 0.01,
                                                       "normalise": False, "ffn": 20}},
        "objective": {"name": "pairs", "label_smoothing": 0.1},
        "schedule": {"name": "inverse_sqrt"},
    },
    "vit": {
        "model": VIT["model"] | {"layers": 3, "stochastic_depth": 0.5, "layer_scale": 0.1},
        "data": VIT["data"],
        "objective": {"name": "classify", "label_smoothing": 0.1, "augment": {"mixup": 0.8}},
        "optimizer": {"layer_decay": 0.75, "ema": 0.9},
    },
    "deit": {
        "model": VIT["model"] | {"vision": {"patch": 2, "distill_token": True}, "attention": {"dropout": 0.1}},
        "data": VIT["data"],
        "objective": {"name": "classify", "label_smoothing": 0.1, "augment": {"mixup": 0.8}},
    },
    "mae": {
        "model": VIT["model"] | {"positions": "sinusoidal", "stochastic_depth": 0.3},
        "data": VIT["data"],
        "objective": {"name": "mae", "mae": {"layers": 1, "hidden": 20, "heads": 2}},
        "optimizer": {"name": "muon"},
    },
    "experts": {
        "model": {"kv_heads": 1, "activation": "swiglu", "norm": "rmsnorm", "layers": 4, "unique_layers": 2,
                  "experts": {"count": 4, "top_k": 2, "capacity": 1.0, "jitter": 0.1, "shared": 1, "bias_rate": 0.01,
                              "ffn": 20}},
        "objective": {"name": "causal", "infill": {"rate": 0.5}},
        "optimizer": {"name": "muon"},
    },
    "dropless": {
        "model": {"positions": "rotary", "tied": False, "activation": "swiglu",
                  "experts": {"count": 5, "score": "sigmoid", "ffn": 20, "bias_rate": 0.001}},
        "objective": {"name": "prefix"},
        "data": {"documents": "isolate"},
        "train": {"ramp": {"start": 4, "increment": 4, "samples": 16}},
        "schedule": {"name": "wsd"},
    },
    "spectral": {
        "model": {"spectral": True, "layers": 2, "stochastic_depth": 0.3,
                  "attention": {"entropy_penalty": 0.05, "qk_norm": True, "dropout": 0.1},
                  "experts": {"count": 3, "pattern": "ED", "bias_rate": 0.01, "ffn": 20}},
        "optimizer": {"ema": 0.9},
    },
    "content": {
        "model": {"layers": 6, "positions": "rotary", "attention": {
            "pattern": ["topk", "routing", "moba", "span", "hierarchical", "logtime"], "span_penalty": 0.1,
            "selected": 2, "clusters": 3, "window": 5, "block": 4, "span": 6, "ramp": 3}},
        "data": {"documents": "isolate"},
    },
    "composed": {
        "model": {"layers": 5, "positions": "rotary", "kv_heads": 1, "attention": {
            "pattern": ["window+sink", "cosine+sparsemax", "general+hard", "temperature+entmax15", "fixed+additive"],
            "dropout": 0.1, "window": 5, "stride": 4, "summaries": 1}},
        "data": {"documents": "isolate"},
    },
    "choices": {
        "model": {"layers": 4, "unique_layers": 2, "positions": "alibi", "kv_heads": 1, "attention": {
            "pattern": ["window+softcap+reinforce", "reinforce"], "window": 5}},
        "data": {"documents": "isolate"},
    },
    "linear": {
        "model": {"layers": 5, "attention": {"pattern": ["gla", "delta", "performer", "rfa", "linear"], "features": 8}},
        "data": {"documents": "isolate"},
    },
}  # fmt: skip

UNCUT = tuple(name for name in CASES if name != "choices")
"""Those that tensor, pipeline and context parallelism take; context parallelism all of them but `mobile`, whose tokens
are embedded with their neighbours."""


Tree = dict[str, Any]


def merged(tree: Tree, more: Tree) -> Tree:
    """A tree with some values changed."""
    both = {
        name: merged(tree[name], value)
        for name, value in more.items()
        if isinstance(value, dict) and isinstance(tree.get(name), dict)
    }
    return tree | more | both


def job_of(
    name: str,
    parallel: Tree,
    steps: int,
    rows: int,
    more: Tree | None = None,
    precision: str = "fp64",
) -> Job:
    """A case as a job: narrow, two blocks, dropout on, clipping on; `more` are settings that it has beside."""
    case = {**CASES, **STUDENTS}[name]
    tree: Tree = {
        "model": {"layers": 2, "hidden": 24, "heads": 3, "dropout": 0.1} | case["model"],
        "data": {"seq_len": LENGTH, "tokenizer": {"kind": "bytes"}} | case.get("data", {}),
        "objective": case.get("objective", {}),
        "optimizer": {"lr": 1e-2, "clip": 0.5} | case.get("optimizer", {}),
        "schedule": {"warmup": 2} | case.get("schedule", {}),
        "parallel": parallel,
        "train": {"steps": steps, "global_batch": rows, "compile": False} | case.get("train", {}),
        "precision": precision,
    }
    return Job.model_validate(merged(tree, more or {}))


def build(job: Job, device: str = "meta", teacher: TeacherShape | None = None):
    """The job's objective, and its samples."""
    from headway.pretrain.data.dataset import row_lengths

    name = job.objective.name
    if job.model.family == "vit":
        inputs = Inputs(length=job.row_tokens, image=8, channels=3, classes=5)
        objective = build_objective(job, inputs, device=device, teacher=teacher)
        if job.model.vision.distill_token:
            teach(objective)
        return objective, Pictures(job.objective.augment.mixup > 0)
    raw, target = (LENGTH, TARGET) if name == "pairs" else row_lengths(job)
    inputs = Inputs(vocab=SPECIALS.vocab, length=LENGTH, target_length=target)
    objective = build_objective(job, inputs, SPECIALS, STARTS, device, teacher)
    ids = SPECIALS.ids
    if name == "pairs":
        short = Texts(1, longest=TARGET - 1), Texts(2, longest=TARGET - 1)
        return objective, TextPairs(*short, LENGTH, TARGET, 0, ids["pad"], "pairs")
    if name == "masked" and (kind := job.objective.masking.pairs) != "none":
        return objective, SegmentPairs(Texts(0), LENGTH, kind, 0, ids["cls"], ids["sep"], ids["pad"], "pairs")
    return objective, TokenRows(Texts(0), raw, 0)


def teach(objective: Classifier) -> None:
    """Give a classifier a teacher: a fixed linear layer over the pixels of whatever it is shown."""
    objective.soft = SoftClasses(hard=False, temperature=2.0, weight=0.4, task=0.6)
    weight_PY = torch.randn(192, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 4
    collate = objective.collate

    def collate_taught(rows: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        batch = collate(rows)
        return batch | {"taught.logits": batch["pixels"].double().flatten(1) @ weight_PY}

    objective.collate = collate_taught


def rows_of(samples: Any, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """The first rows of an epoch with their keys, as a stream would give them."""
    numbers = np.arange(count)
    keys = make_keys("rows", seed, numbers.tolist(), [0] * count)
    return samples.rows(numbers, keys) | {"key": keys, "slot": numbers, "sample": numbers}
