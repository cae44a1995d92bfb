"""ViT (Dosovitskiy et al. 2021) and MAE (He et al. 2022) in transformers' names.

`ViTForImageClassification` and `ViTMAEForPreTraining`. A patch is the vector (channel, row, column) here, as in the
kernel of the patch convolution; transformers' MAE predicts its pixels in the order (row, column, channel).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from headway.pretrain.config import Job
from headway.pretrain.errors import JobError
from headway.pretrain.hf.family import Family, Settings
from headway.pretrain.hf.links import Change, Link, layers, link, reshaped
from headway.pretrain.models.inputs import Inputs

BLOCK = {
    "attention_norm": "layernorm_before",
    "attention.q": "attention.attention.query",
    "attention.k": "attention.attention.key",
    "attention.v": "attention.attention.value",
    "attention.o": "attention.output.dense",
    "mlp_norm": "layernorm_after",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
}


def read(hf: dict, names: frozenset[str]) -> Settings:
    """Settings beyond the table."""
    return {
        "objective.name": "classify",
        "objective.pool": "first",
        "model.positions": "learned",
        "model.init.scheme": "vit",
    }


def write(job: Job, inputs: Inputs) -> dict:
    """Keys beyond the table."""
    labels = {str(i): f"LABEL_{i}" for i in range(inputs.classes)}
    return {
        "architectures": ["ViTForImageClassification"],
        "id2label": labels,
        "label2id": {label: int(i) for i, label in labels.items()},
    }


def read_mae(hf: dict, names: frozenset[str]) -> Settings:
    """MAE's settings beyond the table."""
    if hf["decoder_intermediate_size"] != 4 * hf["decoder_hidden_size"]:
        width, rule = hf["decoder_intermediate_size"], "Headway's decoder is four times as wide inside"
        raise JobError("config.json: decoder_intermediate_size", width, rule, 4 * hf["decoder_hidden_size"])
    return {
        "objective.name": "mae",
        "model.positions": "sinusoidal",
        "model.init.scheme": "vit",
    }


def write_mae(job: Job, inputs: Inputs) -> dict:
    """MAE's keys beyond the table."""
    return {
        "architectures": ["ViTMAEForPreTraining"],
        "decoder_intermediate_size": 4 * job.objective.mae.hidden,
    }


def links(job: Job) -> list[Link]:
    """Where the tensors are."""
    return encoder_links(job, "vit") + layers({"head": "classifier"})


def encoder_links(job: Job, base: str) -> list[Link]:
    """Where the encoder's tensors are; `base` is what transformers calls it."""
    model, side = job.model, job.model.vision.patch
    rows = (job.data.images.size // side) ** 2 + model.vision.prefix_tokens
    kernel = (model.hidden, job.data.images.channels, side, side)
    patches, there = "model.embed.patches", f"{base}.embeddings"
    table = ((rows, model.hidden), (1, rows, model.hidden))
    projection = f"{there}.patch_embeddings.projection"
    found = [
        link(f"{patches}.weight", f"{projection}.weight", reshaped((kernel[0], -1), kernel)),
        link(f"{patches}.bias", f"{projection}.bias"),
        link("model.embed.class_token", f"{there}.cls_token", row(model.hidden)),
        *layers({"model.norm": f"{base}.layernorm"}),
    ]
    if model.positions == "learned":
        found.append(link("model.embed.positions.weight", f"{there}.position_embeddings", reshaped(*table)))
    for i in range(model.layers):
        found += layers(BLOCK, f"model.blocks.{i}.", f"{base}.encoder.layer.{i}.")
    return found


def links_mae(job: Job) -> list[Link]:
    """Where the tensors of MAE are: those of the encoder, and the decoder."""
    mae, pixels = job.objective.mae, pixel_order(job.data.images.channels)
    found = links(job)
    found += layers({"decoder.embed": "decoder.decoder_embed", "decoder.norm": "decoder.decoder_norm"})
    found += layers({"decoder.head": "decoder.decoder_pred"}, change=pixels)
    found.append(link("decoder.mask_token", "decoder.mask_token", row(mae.hidden)))
    for i in range(mae.layers):
        found += layers(BLOCK, f"decoder.blocks.{i}.", f"decoder.decoder_encoder.layer.{i}.")
    return found


def row(width: int) -> Change:
    """A learned token: a row here, a batch of one row there."""
    return reshaped((1, width), (1, 1, width))


def pixel_order(channels: int) -> Change:
    """Rows (channel, row, column) here, (row, column, channel) there."""

    def there(x: Tensor) -> Tensor:
        return x.unflatten(0, (channels, -1)).transpose(0, 1).flatten(0, 1)

    def back(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, channels)).transpose(0, 1).flatten(0, 1)

    return Change(lambda x: [there(x[0])], lambda x: [back(x[0])])


def sinusoids(job: Job) -> dict[str, Tensor]:
    """The fixed positions that MAE's files hold beside the weights: name -> [1, 1 + patches, width], fp32.

    Half of the features turns with the column, half with the row, each sines before cosines (MoCo v3); the class
    token stands at zero.
    """
    side = job.data.images.size // job.model.vision.patch
    widths = {
        "vit.embeddings.position_embeddings": job.model.hidden,
        "decoder.decoder_pos_embed": job.objective.mae.hidden,
    }
    return {name: _table(side, width)[None] for name, width in widths.items()}


def _table(side: int, width: int) -> Tensor:
    rates = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rates
    line = torch.cat((angles.sin(), angles.cos()), -1)  # [side, width / 2]
    grid = torch.cat((line[None].expand(side, -1, -1), line[:, None].expand(-1, side, -1)), -1)
    return torch.cat((torch.zeros(1, width, dtype=torch.float64), grid.flatten(0, 1))).float()


VIT = Family(
    model_type="vit",
    values={
        "model.layers": "num_hidden_layers",
        "model.hidden": "hidden_size",
        "model.heads": "num_attention_heads",
        "model.ffn": "intermediate_size",
        "model.norm_eps": "layer_norm_eps",
        "model.dropout": "hidden_dropout_prob",
        "model.attention.dropout": "attention_probs_dropout_prob",
        "model.init.std": "initializer_range",
        "model.vision.patch": "patch_size",
        "data.images.size": "image_size",
        "data.images.channels": "num_channels",
    },
    fixed={
        "model.family": "vit",
        "model.norm": "layernorm",
        "model.norm_position": "pre",
        "model.positions": "learned",
        "model.bias": True,
        "model.vision.class_token": True,
        "model.vision.distill_token": False,
        "model.embedding_norm": False,
        "model.attention.qk_norm": False,
        "model.attention.scale": None,
        "model.unique_layers": None,
        "model.experts.count": 0,
        "objective.name": "classify",
        "objective.pool": "first",
    },
    theirs={"qkv_bias": True},
    defaults={
        "hidden_act": "gelu",
        "num_channels": 3,
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "image_size": 224,
        "patch_size": 16,
    },
    activation="hidden_act",
    read=read,
    write=write,
    links=links,
    spellings=((r"^(?!vit\.|classifier\.)", "vit."),),
)

MAE = replace(
    VIT,
    model_type="vit_mae",
    values={
        **VIT.values,
        "objective.mae.rate": "mask_ratio",
        "objective.mae.normalise": "norm_pix_loss",
        "objective.mae.layers": "decoder_num_hidden_layers",
        "objective.mae.hidden": "decoder_hidden_size",
        "objective.mae.heads": "decoder_num_attention_heads",
    },
    fixed={
        **{name: value for name, value in VIT.fixed.items() if name != "objective.pool"},
        "model.positions": "sinusoidal",
        "objective.name": "mae",
    },
    defaults={
        **VIT.defaults,
        "mask_ratio": 0.75,
        "norm_pix_loss": False,
        "decoder_num_hidden_layers": 8,
        "decoder_hidden_size": 512,
        "decoder_num_attention_heads": 16,
        "decoder_intermediate_size": 2048,
    },
    read=read_mae,
    write=write_mae,
    links=links_mae,
    constants=sinusoids,
    spellings=((r"^(?!vit\.|decoder\.)", "vit."),),
)
