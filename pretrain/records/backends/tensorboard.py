"""TensorBoard's event files, under `RUN/tensorboard`.

A run that goes on from step k tells TensorBoard to forget what earlier files have of steps after k: they are
computed again.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from headway.pretrain.config import Job
from headway.pretrain.recipe import leaves, one_line
from headway.pretrain.records.backends.base import Gallery, Told

GROUPS = {
    "tokens": "speed",
    "tokens_per_second": "speed",
    "step_seconds": "speed",
    "mfu": "speed",
    "memory_gib": "memory",
    "joules": "energy",
    "bits_per_byte": "heldout",
}
"""Metric -> the group of charts that it stands in; what is not named here belongs to training."""
FLUSH_SECONDS = 10


def tag_of(name: str) -> str:
    """`loss` -> `train/loss`, `heldout_loss` -> `heldout/loss`, `mfu` -> `speed/mfu`."""
    if name.startswith("heldout_"):
        return f"heldout/{name.removeprefix('heldout_')}"
    return f"{GROUPS.get(name, 'train')}/{name}"


class TensorBoardFiles:
    """Scalars of every step, histograms of gradients, the job as text and as hyperparameters, warnings.

    A file that cannot be written ends the telling with one warning; the run goes on.

    Raises:
        OSError: the folder cannot be made or written.
    """

    def __init__(self, told: Told) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._warn, self._alive = told.warn, True
        purge = told.start_step + 1 if told.start_step else None
        folder = told.run_dir / "tensorboard"
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge, flush_secs=FLUSH_SECONDS)
        self._write(self._job, told.job, told.start_step)

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        for name, value in values.items():
            if name != "step":
                self._write(self._writer.add_scalar, tag_of(name), value, step)

    def event(self, kind: str, step: int, fields: Mapping[str, Any]) -> None:
        text = {"warning": "message", "checkpoint": "path"}.get(kind)
        if text:
            self._write(self._writer.add_text, f"{kind}s", str(fields.get(text)), step)

    def histograms(self, step: int, histograms: Mapping[str, tuple[list[float], list[float]]]) -> None:
        for name, (counts, edges) in histograms.items():
            self._write(self._histogram, name, counts, edges, step)

    def show(self, step: int, gallery: Gallery) -> None:
        for name, table in gallery.tables.items():
            self._write(self._writer.add_text, name, markdown(table.columns, table.rows), step)
        for name, pictures in gallery.pictures.items():
            for index, picture in enumerate(pictures):
                tag = f"{name}/{picture.caption or index}"
                self._write(self._picture, tag, picture.png, step)

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        self._write(self._writer.add_text, "status", status)
        self._write(self._writer.close)

    def _histogram(self, name: str, counts: list[float], edges: list[float], step: int) -> None:
        """Sums are those of the bins' middles: the values themselves are not known any more."""
        middles = [(low + high) / 2 for low, high in pairwise(edges)]
        self._writer.add_histogram_raw(
            name,
            min=edges[0],
            max=edges[-1],
            num=sum(counts),
            sum=sum(count * x for count, x in zip(counts, middles, strict=True)),
            sum_squares=sum(count * x * x for count, x in zip(counts, middles, strict=True)),
            bucket_limits=edges[1:],
            bucket_counts=counts,
            global_step=step,
        )

    def _picture(self, tag: str, png: bytes, step: int) -> None:
        """A PNG as it is; `add_image` would draw it anew."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        width, height = struct.unpack(">II", png[16:24])  # of the header's first chunk
        image = Summary.Image(encoded_image_string=png, width=width, height=height, colorspace=4)
        self._writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    def _job(self, job: Job, step: int) -> None:
        from torch.utils.tensorboard.summary import hparams

        settings = {name: one_line(_plain(value)) for name, value in leaves(job)}
        table = markdown(("setting", "value"), list(settings.items()))
        self._writer.add_text("job", table, step)
        # `add_hparams` would begin a run of its own in a subfolder; the same summaries say it of this one.
        for summary in hparams(settings, {tag_of("loss"): 0.0, tag_of("heldout_loss"): 0.0})[:2]:
            self._writer.file_writer.add_summary(summary)

    def _write(self, call: Callable[..., Any], *values: Any) -> None:
        if not self._alive:
            return
        try:
            call(*values)
        except Exception as error:  # the writer's thread hands on whatever stopped it
            self._alive = False
            self._warn(
                f"TensorBoard is told no more ({error}); the run goes on, metrics.jsonl has everything"
            )


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table, as TensorBoard's texts have it; cells are shown as they are."""

    def line(cells: Sequence[Any]) -> str:
        shown = (str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells)
        return f"| {' | '.join(f'`{cell}`' if cell else '' for cell in shown)} |\n"

    head = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
    return head + "".join(line(row) for row in rows)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [item.model_dump(mode="json") if hasattr(item, "model_dump") else item for item in value]
    return value
