"""ZeRO's optimizer beside the stages of a pipeline: torch's schedules run the stages, as in the native engine, and
DeepSpeed reduces what they have summed and steps.

DeepSpeed's own pipeline (`deepspeed.pipe`) knows one order of micro-batches, builds its model anew from layers, and
takes gradients over in its own loop. Here a pipeline keeps its order, its tied weights and its messages, whatever the
engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def between_reductions(engine: Any) -> Iterator[None]:
    """Within, backward passes only add to gradients; after it they are reduced over the data ranks.

    Args:
        engine: DeepSpeed's, at stage 0 or 1.
    """
    engine.set_gradient_accumulation_boundary(False)
    engine._running_engine_backward = True  # so that its hooks leave what follows a backward to us
    try:
        yield
    finally:
        engine._running_engine_backward = False
    engine.set_gradient_accumulation_boundary(True)
    if hasattr(engine.optimizer, "setup_buckets"):
        engine.optimizer.setup_buckets()
    engine.allreduce_gradients()
