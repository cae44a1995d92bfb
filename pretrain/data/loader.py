"""Global batches for one rank, made ready by a thread while the step runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import torch

from headway.pretrain.data.ramp import BatchSizes
from headway.pretrain.data.samples import Rows
from headway.pretrain.data.stream import SampleStream
from headway.pretrain.engine import Batch

Collate = Callable[[Rows], Batch]


class Loader:
    """Endless iterator over this rank's rows of consecutive global batches.

    A batch is what `collate` makes of `SampleStream.batch`, with the keys `sample` (the draw), `slot` (the
    place in the global batch) and `key` (the sample's own) added, all int64 [n]. Up to `ahead` batches wait
    ready. The stream's cursor moves when a batch is handed out, not when it is prepared: a checkpoint saved
    after the step that used the batch resumes with the next one.

    An error in the thread is raised by `next`, in the place of the batch it belongs to; the cursor stays
    before that batch. Use as a context manager, or call `close`.

    Args:
        stream: the order; its cursor says where to begin.
        collate: turns rows (arrays) into tensors whose first dim is the sample.
        sizes: rows of each step's global batch, over all ranks.
        rank: this rank among `ranks` that share the global batch.
        ranks: how many there are.
        ahead: batches prepared in advance.
        pin: put batches in page-locked memory, from which copies to a GPU need not wait.
    """

    def __init__(
        self,
        stream: SampleStream,
        collate: Collate,
        sizes: BatchSizes,
        rank: int = 0,
        ranks: int = 1,
        ahead: int = 2,
        pin: bool = False,
    ) -> None:
        self.stream, self.collate, self.sizes = stream, collate, sizes
        self.rank, self.ranks, self.ahead, self.pin = rank, ranks, ahead, pin
        self._thread: ThreadPoolExecutor | None = None
        self._waiting: deque[tuple[range, Future[Batch]]] = deque()
        self.draws = range(0)  # of the last batch that was handed out

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        while len(self._waiting) <= self.ahead:
            first = self._waiting[-1][0].stop if self._waiting else self.stream.draw
            rows = self.sizes.rows(self.sizes.step_of(first))
            self._waiting.append((range(first, first + rows), self._thread.submit(self._make, first, rows)))
        draws, future = self._waiting[0]
        try:
            batch = future.result()
        except BaseException:
            self.draws = draws
            self.close()
            raise
        self._waiting.popleft()
        self.draws, self.stream.draw = draws, draws.stop
        return batch

    def _make(self, first: int, count: int) -> Batch:
        rows = self.stream.batch(first, count, self.rank, self.ranks)
        batch = self.collate(rows) | {key: torch.from_numpy(rows[key]) for key in ("sample", "slot", "key")}
        return {key: tensor.pin_memory() for key, tensor in batch.items()} if self.pin else batch

    def state(self) -> dict[str, Any]:
        """The stream's cursor after the last batch that was handed out."""
        return self.stream.state()

    def load(self, state: dict[str, Any]) -> list[str]:
        """Go on from a saved cursor; drops prepared batches. Returns what differs, as the stream does."""
        self.close()
        return self.stream.load(state)

    def close(self) -> None:
        """Stop the thread and drop prepared batches; the next `next` starts again at the cursor."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._thread = None
        self._waiting.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
