"""Recomputation of one block: which of the tensors that its backward needs are kept, and which computed again.

Random numbers depend on coordinates alone, so a block computed again draws what it drew before: no generator's state is
kept. Names of parameters stay: a module's forward is replaced, no module is wrapped.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from headway.pretrain.models.attention import Attention
from headway.pretrain.models.transformer import Block

Policy = Literal["none", "attention", "products", "full"]
"""What a block computes again: nothing, its attention cores, all but matrix products, everything."""

Forward = Callable[..., Any]

_again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def recompute_block(block: Block, policy: Policy) -> None:
    """Let a block's backward compute again what the policy says.

    `full` keeps the block's input alone (Chen et al. 2016). `attention` keeps queries, keys and values (Korthikanti et
    al. 2022, section 5, "selective"). `products` keeps what products with weights and fused attention kernels give.
    """
    if policy == "full":
        block.forward = Whole(block.forward)  # type: ignore[method-assign]
    elif policy == "products":
        block.forward = partial(  # type: ignore[method-assign]
            _again, block.forward, context_fn=partial(create_selective_checkpoint_contexts, keeps_products)
        )
    elif policy == "attention":
        for core in (module.core for module in block.modules() if isinstance(module, Attention)):
            core.forward = partial(_again, core.forward)  # type: ignore[method-assign]


class Whole:
    """A forward that is computed again as a whole.

    Compiled, it is the inside that is: both times the same code runs, so that the bits are the same, where a backward
    fused with a recomputation would round in other places.
    """

    def __init__(self, forward: Forward) -> None:
        self.forward = forward

    def compile(self) -> None:
        self.forward = torch.compile(self.forward)

    def __call__(self, *args: Any) -> Any:
        return _again(self.forward, *args)


def keeps_products(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Policy of selective checkpointing: what products of many rows and fused attention kernels give is kept.

    Batched products are not: the attention kernels that use them hold S x S scores, which they write to. Products of
    one row are not: they cost nothing (spectral norms), and torch writes to their outputs too.
    """
    row = operator is torch.ops.aten.mm.default and args[0].shape[0] == 1
    return (
        CheckpointPolicy.MUST_SAVE
        if operator in products() and not row
        else CheckpointPolicy.PREFER_RECOMPUTE
    )


@cache
def products() -> frozenset[Any]:
    """Operators whose outputs `products` keeps."""
    aten, ours = torch.ops.aten, torch.ops.headway
    return frozenset(
        {
            aten.mm.default,
            aten.addmm.default,
            aten._grouped_mm.default,
            ours.grouped_linear.default,
            aten._scaled_dot_product_flash_attention_for_cpu.default,
            aten._scaled_dot_product_flash_attention.default,
            aten._scaled_dot_product_efficient_attention.default,
            aten._scaled_dot_product_cudnn_attention.default,
        }
    )


def compile_block(block: nn.Module) -> None:
    """torch.compile of a block, inside what computes it again as a whole."""
    if isinstance(block.forward, Whole):
        block.forward.compile()
    else:
        block.compile()
