"""Megatron-Core 0.16.1 is silently wrong in places; here is what keeps us out of them. Each has a test that shows the
wrong result first.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer import TransformerConfig


def exact(**settings: Any) -> TransformerConfig:
    """A configuration with which schedules, DDP and `finalize_model_grads` give sums, and the right ones."""
    settings |= {"calculate_per_token_loss": True, "enable_autocast": False, "cuda_graph_scope": []}
    if settings.get("virtual_pipeline_model_parallel_size"):
        settings |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return TransformerConfig(**settings)
