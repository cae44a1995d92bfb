"""`ledger.jsonl`: which samples every step used, as the ranks found them in their batches.

One JSON object a step, each step once: `step, rows, draws, digest` (see `Used`; the digest in hexadecimal). The first
step after every start also has `order`: the cursor from which the run went on, with the sources and their sizes, the
weights, and the sizes of batches. `headway.pretrain.data.ledger_check` proves from it what was used how often.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from headway.pretrain import config
from headway.pretrain.data.stream import SampleStream
from headway.pretrain.data.used import Used
from headway.pretrain.records.metrics import MetricsFile

LEDGER = "ledger.jsonl"


class Ledger:
    """Appends what steps used to a run's `ledger.jsonl`. Steps that a killed run did after its last checkpoint are
    cut off, as they are from `metrics.jsonl`: they are done again.

    Args:
        folder: the run's.
        start_step: of the checkpoint from which the run goes on.
        order: where the run goes on, from `order_of`.
        warn: is told once if a line cannot be written; the line goes out with the next one.
    """

    def __init__(
        self, folder: Path, start_step: int, order: dict[str, Any], warn: Callable[[str], None]
    ) -> None:
        self._file = MetricsFile(folder / LEDGER, start_step)
        self._order: dict[str, Any] | None = order
        self._warn: Callable[[str], None] | None = warn

    def step(self, step: int, used: Used | None) -> None:
        """Append one step, counted from 1; nothing if its batch had no keys."""
        if used is None:
            return
        row: dict[str, Any] = {"step": step, "rows": used.rows, "draws": used.draws}
        row["digest"] = f"{used.digest:016x}"
        row |= {"order": self._order} if self._order else {}
        self._order = None
        try:
            self._file.write(row)
        except OSError as error:
            if self._warn:
                self._warn(f"{LEDGER}: {error.strerror or error}; its latest lines wait for the next step")
            self._warn = None

    def close(self) -> None:
        self._file.close()


def order_of(stream: SampleStream, train: config.Train) -> dict[str, Any]:
    """All that the coming draws are a function of, as JSON values: the stream's state, sizes of sources and batches."""
    state, sizes = stream.state(), dict(zip(stream.names, stream.counts, strict=True))
    sources = [{**source, "size": sizes.get(source["name"])} for source in state["sources"]]
    batches = {"global_batch": train.global_batch, "ramp": train.ramp.model_dump(mode="json")}
    return state | {"sources": sources} | batches
