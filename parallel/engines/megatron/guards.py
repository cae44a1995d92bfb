"""Megatron-Core 0.16.1 is silently wrong in places; here is what keeps us out of them. `test_megatron_guards.py` shows
each wrong result first.

- The interleaved schedule without `overlap_p2p_comm`: on two ranks messages of both directions are taken for each
  other, and gradients are wrong: `exact`. Whatever the reason, `wire.Ledger` sees it.
- A loss is divided by the number of micro-batches, in place, so that what was reported of it is, too: `exact`.
- `enable_autocast` is autocast of CUDA only: `exact` leaves it off, and stages have autocast of their own.
- Gradients of whole parameters that are shares (norms under sequence parallelism) are not summed over the tensor axis
  unless parameters and configuration say so: `check_shares`.
- Parameters with one dim lose their weight decay by default, and Megatron's scheduler overwrites the others':
  `check_groups`.
- `DistributedOptimizer.load_state_dict` gives all parameters one `step`, which each counts up: it is not used;
  `optimizers.allocate` gives each its own.
- With `overlap_param_gather`, parameters that are read from outside of their module (a table that is also the head) are
  those of the step before on other ranks: `gather_whole`.
- `dist_checkpointing.save` starts a process that imports the main module again, and hangs where that is not guarded: it
  is not used.
- `bucket.param_to_index` forgets the room between parameters; `buffer.param_index_map` does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from headway.pretrain.errors import HeadwayError


class GuardError(HeadwayError):
    """Megatron-Core would compute something else than what is meant; raised before the first step."""

    def __init__(self, found: str) -> None:
        super().__init__(
            f"{found}. This is a fault of Headway's, not of the job's: use parallel.engine = native"
        )


def exact(**settings: Any) -> TransformerConfig:
    """A configuration with which schedules, DDP and `finalize_model_grads` give sums, and the right ones."""
    settings |= {"calculate_per_token_loss": True, "enable_autocast": False, "cuda_graph_scope": []}
    if settings.get("virtual_pipeline_model_parallel_size"):
        settings |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return TransformerConfig(**settings)


def check_shares(named: Mapping[str, Tensor], config: TransformerConfig) -> None:
    """Raise GuardError if the gradient of a parameter is a share that `finalize_model_grads` would not sum.

    Args:
        named: parameters; those with `tensor_share` (`parallel.parts`) have shares for gradients.
        config: of the DDP around them.
    """
    shares = [name for name, p in named.items() if getattr(p, "tensor_share", False)]
    unmarked = [name for name in shares if not getattr(named[name], "sequence_parallel", False)]
    if unmarked:
        raise GuardError(f"gradients are shares, and not marked `sequence_parallel`: {', '.join(unmarked)}")
    if shares and not config.sequence_parallel:
        raise GuardError(
            f"gradients are shares ({shares[0]}...), and `sequence_parallel` is off: nothing is summed"
        )


def check_groups(groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise GuardError if groups of an optimizer's parameters are not ours, whose `weight_decay` is what it says."""
    for group in groups:
        for name in ("wd_mult", "lr_mult"):
            if group.get(name, 1.0) != 1.0:
                raise GuardError(
                    f"a group of {len(group['params'])} parameters has {name} {group[name]}, which we never give"
                )


def gather_whole(data: DistributedDataParallel) -> tuple[Callable[[], None], Callable[[], None]]:
    """With `overlap_param_gather`: gather all parameters in the background, and wait for all of them, instead of for
    each module's when it is called.

    Returns: what starts it, for after an update; and what waits, for before parameters are read by anybody. Waiting
    twice, or without having started, does nothing.
    """
    data.disable_forward_pre_hook(param_sync=False)

    def wait() -> None:
        for group in (*data.bucket_groups, *data.expert_parallel_bucket_groups):
            if group.param_gather_handle is not None:
                group.finish_param_sync(skip_next_bucket_dispatch=True)

    return data.start_param_sync, wait
