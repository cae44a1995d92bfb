"""Students and their teachers, a pair of every family: what layouts of distillation are proved by.

Between them they have every part of the loss, and teachers of other widths, depths and heads.
"""

from __future__ import annotations

from typing import Any

Tree = dict[str, Any]

ALL = {
    "teacher": "memory",
    "task": 0.5,
    "logits": {"weight": 0.7, "temperature": 2.0},
    "attention": {"weight": 1.0, "loss": "kl"},
    "relations": {"weight": 0.5, "of": ["queries", "keys", "values"], "heads": 2},
    "states": {"weight": 0.3, "embeddings": True},
    "final": {"weight": 0.4},
}

BERT: Tree = {"family": "bert", "norm_position": "post", "embedding_norm": True, "segments": 2, "pooler": True,
              "activation": "gelu", "init": {"scheme": "bert"}}  # fmt: skip
T5: Tree = {"family": "t5", "norm": "rmsnorm", "positions": "relative", "bias": False, "relative_buckets": 8,
            "relative_distance": 12, "attention": {"scale": 1.0}, "head_scale": 0.2,
            "init": {"scheme": "t5"}}  # fmt: skip
VIT: Tree = {"family": "vit", "activation": "gelu", "vision": {"patch": 2}, "init": {"scheme": "vit"}}

STUDENTS: dict[str, Tree] = {
    "learning_gpt": {
        "model": {"heads": 4, "positions": "rotary", "head_dim": 6, "attention": {"dropout": 0.1}},
        "objective": {"distill": ALL | {"contrast": {"weight": 0.2, "queue": 30, "width": 8}}},
    },
    "learning_alibi": {
        "model": {"heads": 4, "kv_heads": 2, "positions": "alibi"},
        "data": {"documents": "isolate"},
        "objective": {
            "distill": {
                "teacher": "memory",
                "logits": {"weight": 1.0, "top_k": 5, "divergence": "js"},
                "attention": {"weight": 1.0, "loss": "js", "heads": [3, 3, 0, 1]},
                "rows": {"weight": 0.1, "count": 5},
                "contrast": {"weight": 0.2, "kind": "crd", "width": 8},
            }
        },
    },
    "learning_bert": {
        "model": BERT | {"heads": 4},
        "objective": {
            "name": "masked",
            "masking": {"pairs": "next", "rate": 0.25},
            "distill": ALL
            | {
                "attention": {"weight": 1.0, "loss": "scores"},
                "states": {"weight": 0.3, "loss": "normalised", "progressive": 2},
                "logits": {"weight": 0.7, "divergence": "reverse", "begin": 1, "end": 3},
            },
        },
    },
    "learning_t5": {
        "model": T5 | {"heads": 4, "decoder_layers": 2},
        "objective": {
            "name": "spans",
            "distill": ALL
            | {"attention": {"weight": 1.0, "loss": "mse"}, "rows": {"weight": 0.1, "count": 6}},
        },
    },
    "learning_vit": {
        "model": VIT | {"heads": 4},
        "data": {"images": {"size": 8}},
        "objective": {
            "name": "classify",
            "distill": ALL
            | {
                "attention": {"weight": 1.0, "loss": "reverse_kl"},
                "contrast": {"weight": 0.2, "width": 8},
            },
        },
    },
}

WIDE = {"layers": 4, "hidden": 40, "dropout": 0.0}
TEACHERS: dict[str, Tree] = {
    "learning_gpt": {"model": WIDE | {"heads": 8, "positions": "rotary", "head_dim": 10}},
    "learning_alibi": {"model": WIDE | {"heads": 4, "positions": "alibi", "layers": 2}},
    "learning_bert": {
        "model": BERT | WIDE | {"heads": 4},
        "objective": {"name": "masked", "masking": {"pairs": "next"}},
    },
    "learning_t5": {
        "model": T5 | WIDE | {"heads": 4, "decoder_layers": 4, "tied": False},
        "objective": {"name": "spans"},
    },
    "learning_vit": {
        "model": VIT | WIDE | {"heads": 8},
        "data": {"images": {"size": 8}},
        "objective": {"name": "classify"},
    },
}
"""Their weights follow from their seed alone."""
