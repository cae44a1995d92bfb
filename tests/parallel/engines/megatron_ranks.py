"""Megatron's groups for the time of a test: its `parallel_state` is one of the process."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def groups(**sizes: int) -> Iterator[None]:
    """`initialize_model_parallel` over the ranks of the call, with the adapter; undone at the end."""
    from headway.parallel.engines.megatron.cpu import adapt

    adapt()
    from megatron.core import parallel_state

    from headway.parallel.engines.megatron.groups import stop

    stop()  # an engine leaves its groups to the next one
    parallel_state.initialize_model_parallel(**sizes)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
