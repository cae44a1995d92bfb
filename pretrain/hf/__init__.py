"""Models of Hugging Face, both ways: one file a family, each a table of settings and a table of tensors.

Weights move as safetensors; transformers is not needed. See `folder.py` for reading and writing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headway.pretrain.config import Job
from headway.pretrain.errors import JobError
from headway.pretrain.hf.bert import ALBERT, BERT
from headway.pretrain.hf.deit import DEIT
from headway.pretrain.hf.family import Family
from headway.pretrain.hf.gpt2 import GPT2
from headway.pretrain.hf.llama import LLAMA, MIXTRAL, QWEN3
from headway.pretrain.hf.mobilebert import MOBILEBERT
from headway.pretrain.hf.t5 import T5
from headway.pretrain.hf.vit import MAE, VIT

FAMILIES = {
    f.model_type: f for f in (GPT2, LLAMA, QWEN3, MIXTRAL, BERT, ALBERT, MOBILEBERT, T5, VIT, DEIT, MAE)
}


def family_of_config(hf_config: Mapping[str, Any]) -> Family:
    """The family of a config.json; raises JobError if Headway does not have it."""
    kind = hf_config.get("model_type")
    if kind is None:  # files of transformers 3 and older name the class only
        names = [str(name).lower() for name in hf_config.get("architectures") or []]
        kind = next((f for f in FAMILIES if any(n.startswith(f.replace("_", "")) for n in names)), None)
    if kind not in FAMILIES:
        raise JobError("config.json: model_type", kind, f"Headway knows {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def family_of_job(job: Job) -> Family:
    """The family that a job's model is nearest to; its export names what does not fit."""
    model = job.model
    if model.family == "t5":
        return T5
    if model.family == "vit":
        if job.model.vision.distill_token:
            return DEIT
        return MAE if job.objective.name == "mae" else VIT
    if model.family == "bert" and (model.bottleneck.hidden or model.embedding_trigram):
        return MOBILEBERT
    if model.family == "bert":
        return ALBERT if model.embedding_size or model.unique_layers else BERT
    if model.positions != "rotary":
        return GPT2
    if model.experts.count:
        return MIXTRAL
    return QWEN3 if model.attention.qk_norm else LLAMA
