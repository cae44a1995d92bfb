"""Rotary positions in config.json: `rope_parameters` (transformers 5), `rope_theta` and `rope_scaling` (4)."""

from __future__ import annotations

import math
from typing import Any

from headway.kernels.rotary import stretched_base
from headway.pretrain.config import Job
from headway.pretrain.errors import JobError
from headway.pretrain.hf.family import Settings

COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
LENGTH = "original_max_position_embeddings"
YARN = {
    "factor",
    LENGTH,
    "beta_fast",
    "beta_slow",
    "truncate",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
}
KEYS = {
    "default": {LENGTH},
    "linear": {"factor", LENGTH},
    "yarn": YARN,
    "llama3": {"factor", LENGTH, "low_freq_factor", "high_freq_factor"},
}
"""Kinds that Headway has, and the keys that they may have; the length is read where it means something."""

NEEDED = {"linear": {"factor"}, "llama3": {"factor", "low_freq_factor", "high_freq_factor"}}


def read_rope(hf: dict) -> Settings:
    """Settings of rotary positions. Raises JobError for kinds and keys that Headway does not have."""
    rope = hf.get("rope_parameters") or {**(hf.get("rope_scaling") or {}), "rope_theta": hf.get("rope_theta")}
    rope = {key: value for key, value in rope.items() if value is not None}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in KEYS or rope.get("partial_rotary_factor", 1.0) != 1.0:
        rule = f"Headway has rotary positions of whole heads, of the kinds {', '.join(KEYS)}"
        raise JobError("config.json: rope_parameters", rope, rule, "default")
    unknown = rope.keys() - COMMON - KEYS[kind]
    if unknown:
        rule = f"rotary positions of the kind {kind} have {', '.join(sorted(KEYS[kind]))}"
        raise JobError(f"config.json: rope_parameters.{min(unknown)}", rope[min(unknown)], rule, None)
    missing = NEEDED.get(kind, set()) - rope.keys()
    if missing:
        raise JobError(f"config.json: rope_parameters.{min(missing)}", None, f"{kind} must say it")
    theta = rope.get("rope_theta") or hf.get("rope_theta") or hf.get("default_theta", 10000.0)
    found = {"kind": "none" if kind == "default" else kind}
    if kind in ("linear", "llama3"):
        found |= {"factor": float(rope["factor"])}
    if kind in ("yarn", "llama3"):
        length = hf.get(LENGTH) or rope.get(LENGTH) or hf["max_position_embeddings"]
        found |= {"original_length": length}
    if kind == "llama3":
        found |= {"slow": float(rope["low_freq_factor"]), "fast": float(rope["high_freq_factor"])}
    if kind == "yarn":
        found |= _read_yarn(rope, hf["max_position_embeddings"] / found["original_length"])
    scaling = {f"model.rotary_scaling.{name}": value for name, value in found.items()}
    return {"model.rotary_base": float(theta), **scaling}


def _read_yarn(rope: dict, longer: float) -> dict[str, Any]:
    """`longer`: how many times as long as the original rows may be, which is the factor if none is given."""
    factor, size = float(rope.get("factor") or longer), rope.get("attention_factor")
    if size is None and rope.get("mscale") and rope.get("mscale_all_dim"):  # DeepSeek's
        grown = [0.1 * rope[key] * math.log(max(factor, 1.0)) + 1 for key in ("mscale", "mscale_all_dim")]
        size = grown[0] / grown[1]
    return {
        "factor": factor,
        "slow": float(rope.get("beta_slow") or 1),
        "fast": float(rope.get("beta_fast") or 32),
        "whole": bool(rope.get("truncate", True)),
        "attention_factor": size,
    }


def write_rope(job: Job) -> dict:
    """Keys of rotary positions."""
    m, scaling = job.model, job.model.rotary_scaling
    theta, rope = m.rotary_base, {}
    slow, fast = scaling.slow or 1.0, scaling.fast
    if scaling.kind == "linear":
        rope = {"rope_type": "linear", "factor": scaling.factor}
    elif scaling.kind == "ntk":  # transformers has no name for it but another base
        theta = stretched_base(m.head_width, theta, scaling.factor)
    elif scaling.kind == "llama3":
        rope = {"rope_type": "llama3", "factor": scaling.factor, LENGTH: scaling.original_length}
        rope |= {"low_freq_factor": slow, "high_freq_factor": fast or 4.0}
    elif scaling.kind == "yarn":
        rope = {"rope_type": "yarn", "factor": scaling.factor, LENGTH: scaling.original_length}
        rope |= {"beta_slow": slow, "beta_fast": fast or 32.0, "truncate": scaling.whole}
        if scaling.attention_factor is not None:
            rope["attention_factor"] = scaling.attention_factor
    older = {"rope_theta": theta, **({"rope_scaling": rope} if rope else {})}
    return {"rope_parameters": {"rope_type": "default", **rope, "rope_theta": theta}, **older}
