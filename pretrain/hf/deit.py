"""DeiT (Touvron et al. 2021) in transformers' names: `DeiTForImageClassificationWithTeacher`, a ViT with a distillation
token and a head that reads it.

`DeiTForImageClassification` has the token and reads the class token alone: of such a file the head is not read.
"""

from __future__ import annotations

from dataclasses import replace

from headway.pretrain.config import Job
from headway.pretrain.hf import vit
from headway.pretrain.hf.links import Link, layers, link
from headway.pretrain.models.inputs import Inputs


def write(job: Job, inputs: Inputs) -> dict:
    """Keys beyond the table."""
    return vit.write(job, inputs) | {"architectures": ["DeiTForImageClassificationWithTeacher"]}


def links(job: Job) -> list[Link]:
    """Where the tensors are."""
    token = "model.embed.distill_token", "deit.embeddings.distillation_token"
    heads = layers({"head": "cls_classifier", "head_distill": "distillation_classifier"})
    return [*vit.encoder_links(job, "deit"), link(*token, vit.row(job.model.hidden)), *heads]


DEIT = replace(
    vit.VIT,
    model_type="deit",
    fixed={**vit.VIT.fixed, "model.vision.distill_token": True},
    write=write,
    links=links,
    spellings=((r"^(?!deit\.|(cls_|distillation_)?classifier\.)", "deit."),),
)
