"""Recomputation of one block: which of the tensors that its backward needs are kept, and which computed again.

Random numbers depend on coordinates alone, so a block computed again draws what it drew before: no generator's state is
kept. Names of parameters stay: a module's forward is replaced, no module is wrapped.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from headway.parallel.planner.activations import Policy
from headway.pretrain.models.attention import Attention
from headway.pretrain.models.transformer import Block

Forward = Callable[..., Any]

_again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class Around:
    """A forward with something done around it, which a compiler is kept out of: it gets the inside."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward

    def compile(self) -> None:
        if isinstance(self.forward, Around):
            self.forward.compile()
        else:
            self.forward = torch.compile(self.forward)

    def __call__(self, *args: Any) -> Any:
        raise NotImplementedError


class Whole(Around):
    """A forward that is computed again as a whole (Chen et al. 2016): its inputs alone are kept.

    Compiled, the same code runs both times, so that the bits are the same, where a backward that is fused with a
    recomputation may round in other places.
    """

    def __call__(self, *args: Any) -> Any:
        return _again(self.forward, *args)


def recompute_block(block: Block, policy: Policy) -> None:
    """Let a block's backward compute again what the policy says.

    `full` keeps the block's input alone. `attention` keeps queries, keys and values, and computes the core again
    (Korthikanti et al. 2022, section 5); of fused kernels, which hold no S x S, that is little. `products` keeps what
    products with weights and fused attention kernels give.
    """
    if policy == "full":
        block.forward = Whole(block.forward)  # type: ignore[method-assign, assignment]
    elif policy == "products":
        contexts = partial(create_selective_checkpoint_contexts, keeps_products)
        block.forward = _selective(block.forward, context_fn=contexts)  # type: ignore[method-assign]
    elif policy == "attention":
        for core in (module.core for module in block.modules() if isinstance(module, Attention)):
            core.forward = _selective(core.forward)  # type: ignore[method-assign]


def _selective(inner: Forward, **settings: Any) -> Forward:
    """A forward that is partly computed again: a compiler sees it all, and divides its graph accordingly."""

    def forward(*args: Any) -> Any:
        return _again(inner, *args, **settings)

    return forward


def keeps_products(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Policy of selective checkpointing: what products of many rows and fused attention kernels give is kept.

    Batched products are not: the attention kernels that use them hold S x S scores, which they write to. Products of
    one row are not: they cost nothing (spectral norms), and torch writes to their outputs too.
    """
    row = operator is torch.ops.aten.mm.default and args[0].shape[0] == 1
    keep = operator in products() and not row
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def products() -> frozenset[Any]:
    """Operators whose outputs `products` keeps."""
    aten = torch.ops.aten
    return frozenset(
        {
            aten.mm.default,
            aten.addmm.default,
            aten._grouped_mm.default,
            torch.ops.headway.grouped_linear.default,  # of kernels/grouped.py, which blocks import
            torch.ops.headway.attention_cpp.default,  # of kernels/attention/cpp.py
            aten._scaled_dot_product_flash_attention_for_cpu.default,
            aten._scaled_dot_product_flash_attention.default,
            aten._scaled_dot_product_efficient_attention.default,
            aten._scaled_dot_product_cudnn_attention.default,
        }
    )


def compile_block(block: nn.Module) -> None:
    """torch.compile of a block, inside what is done around it."""
    if isinstance(block.forward, Around):
        block.forward.compile()
    else:
        block.compile()
