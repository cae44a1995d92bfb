"""Dense attention within a mixer, and what it costs.

Shapes: B batch, S sequence, M latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.kernels.attention.masks import Mask
from headway.pretrain import config
from headway.pretrain.errors import JobError
from headway.pretrain.models.cost import Cost, projections
from headway.pretrain.models.layers import Noise
from headway.pretrain.models.seat import Seat

INNER = Seat(cross=True)
"""Where a mixer's own attention sits: it looks at what it is given."""


def as_dense(model: config.Model) -> config.Model:
    """The model with dense attention in all layers, for layers within a mixer."""
    return model.model_copy(
        update={"attention": model.attention.model_copy(update={"mechanism": "dense", "pattern": ()})}
    )


def refuse_qk_norm(model: config.Model, word: str) -> None:
    """Raises JobError where queries and keys are to be normalised that are no heads'."""
    if model.attention.qk_norm:
        rule = f"has no effect on {word}, which compares no queries and keys of heads"
        raise JobError("model.attention.qk_norm", True, rule, False)


def real(mask: Mask) -> Tensor | None:
    """Which places are not padding, bool [B, S]; None if all are, or nothing says so."""
    assert mask.split is None, "this mixer needs all columns of a sequence"
    return None if mask.documents is None else mask.documents >= 0


def without_padding(x_BSE: Tensor, real_BS: Tensor | None) -> Tensor:
    """x with zeros at padding."""
    return x_BSE if real_BS is None else torch.where(real_BS[..., None], x_BSE, 0)


def read_mask(mask: Mask, latents: int) -> Mask:
    """What latents see of a sequence: all but padding."""
    real_BS = real(mask)
    if real_BS is None:
        return Mask(causal=False)
    keys_BS = real_BS.int() - 1
    return Mask(False, keys_BS.new_zeros(len(keys_BS), latents), keys_BS)


def noise_of_latents(noise: Noise | None, latents: int) -> Noise | None:
    """Noise whose places are latents."""
    return noise and noise.over(torch.arange(latents, device=noise.key.device))


def attention_parts(model: config.Model, queries: int, keys: int) -> list[Cost]:
    """Dense attention of so many queries to so many keys, with its projections."""
    pairs = Cost(flops=4 * model.heads * model.head_width * queries * keys)
    return [*projections(model, queries, keys), pairs]
