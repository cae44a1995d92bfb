"""fp8: products of 8-bit floats in the linear layers of blocks, by torchao; everything else is as in bf16.

Rows are scaled by their own largest element, and the gradient of a weight is a bf16 product (torchao's recipe
`rowwise_with_gw_hp`), so that no number depends on which rows share a rank or a micro-batch. Scaling by the largest
element of the whole tensor, the commoner way, would make the curve a matter of the layout.

Heads, embeddings, routers and experts stay in bf16, as in Micikevicius et al. 2022, section 4.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from dataclasses import replace

import torch

from headway.parallel.mesh import Layout
from headway.pretrain.config import Job
from headway.pretrain.errors import JobError
from headway.pretrain.models.layers import Linear
from headway.pretrain.models.transformer import Block
from headway.pretrain.objectives import Objective

RECIPE = "rowwise_with_gw_hp"
SIDE = 16
"""What both sides of a product must be multiples of."""
CAPABILITY = (9, 0)
"""CUDA devices from Hopper on have products of rows with scales of their own."""


def check_float8(job: Job, layout: Layout, device_type: str) -> None:
    """Raise JobError if the job asks for fp8 where it cannot be had."""
    if job.precision != "fp8":
        return
    if device_type != "cuda" or torch.cuda.get_device_capability() < CAPABILITY:
        rule = "needs a CUDA device of compute capability 9.0 (Hopper) or newer"
        raise JobError("precision", "fp8", rule, "bf16")
    if importlib.util.find_spec("torchao") is None:
        raise JobError("precision", "fp8", "needs torchao (pip install 'headway[fp8]')", "bf16")
    if layout.tensor > 1:
        rule = "scales whole rows of features, of which a tensor-parallel rank has a part"
        raise JobError("precision", "fp8", rule, "bf16, or parallel.tensor = 1")
    if job.model.spectral:
        raise JobError("precision", "fp8", "not with model.spectral: its weights are computed", "bf16")
    for field, width in _widths(job).items():
        if width % SIDE:
            raise JobError(field, width, f"must be a multiple of {SIDE} in fp8", -(-width // SIDE) * SIDE)


def _widths(job: Job) -> dict[str, int]:
    """Field -> a side of a block's products."""
    m = job.model
    widths = {"model.hidden": m.hidden, "model.ffn": m.ffn_width}
    widths |= {
        "model.heads x model.head_dim": m.heads * m.head_width,
        "model.kv_heads x model.head_dim": m.kv * m.head_width,
    }
    if m.bottleneck.hidden:
        widths["model.bottleneck.hidden"] = m.bottleneck.hidden
    if m.experts.count and m.experts.shared:
        widths["model.experts.shared x model.experts.ffn"] = m.experts.shared * (m.experts.ffn or m.ffn_width)
    return widths | (
        {"objective.mae.hidden": job.objective.mae.hidden} if job.objective.name == "mae" else {}
    )


def to_float8(objective: Objective, *, emulate: bool = False) -> None:
    """Let the linear layers of all blocks multiply in fp8; names of parameters do not change.

    Args:
        emulate: compute the same numbers in wider floats, on any device; for tests.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torchao").setLevel(logging.ERROR)  # it warns of kernels that nothing here uses
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    settings = replace(Float8LinearConfig.from_recipe_name(RECIPE), emulate=emulate)
    for block in (module for module in objective.modules() if isinstance(module, Block)):
        convert_to_float8_training(
            block,
            module_filter_fn=lambda module, _: type(module) is Linear,  # a router is not
            config=settings,
        )
