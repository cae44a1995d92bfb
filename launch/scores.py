"""What a trained model is worth: its number beside a baseline on the same held-out data, by objective."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np

from headway.kernels.cross_entropy import IGNORE
from headway.launch.assemble import Parts
from headway.pretrain.data.build import heldout_bytes
from headway.pretrain.data.images.baselines import logistic_accuracy, mean_patch_error
from headway.pretrain.data.images.samples import ImageSamples
from headway.pretrain.data.samples import Rows
from headway.pretrain.data.store import TokenStore
from headway.pretrain.engine import Batch
from headway.pretrain.evaluate import heldout_rows
from headway.pretrain.records.records import read_events
from headway.pretrain.records.report import OURS

COUNTED = 20_000_000
"""Tokens of each store that are counted for the commonest one."""


@dataclass(frozen=True)
class Score:
    """A number and its baselines.

    Attributes:
        title: what is measured.
        note: how, for people.
        lower: whether less is better.
        entries: (name, value), this model first.
    """

    title: str
    note: str
    lower: bool
    entries: list[tuple[str, float]]

    def plain(self) -> dict:
        return asdict(self)


def score(parts: Parts, values: dict[str, float]) -> Score | None:
    """The score of the trained model; `values` are its held-out loss and metrics. None without held-out data."""
    make = SCORES[parts.job.objective.name]
    return make(parts, values) if values else None


def bits(parts: Parts, values: dict[str, float]) -> Score | None:
    """Bits per byte of held-out text beside general compressors."""
    if "bits_per_byte" not in values or parts.dataset.prepared is None:
        return None
    prepared = parts.dataset.prepared
    text = heldout_bytes(prepared.heldout, prepared.tokenizer)
    note = f"What it takes to store one byte of the same {len(text):,} bytes of held-out text."
    entries = [
        (OURS, values["bits_per_byte"]),
        ("zlib -9", 8 * len(zlib.compress(text, 9)) / len(text)),
        ("xz -9", 8 * len(lzma.compress(text, preset=9)) / len(text)),
    ]
    return Score("bits per byte", note, True, entries)


def masked_accuracy(parts: Parts, values: dict[str, float]) -> Score:
    """Share of masked tokens that are guessed, beside guessing the commonest token always."""
    prepared = parts.dataset.prepared
    assert prepared is not None
    counts = np.zeros(prepared.tokenizer.vocab, dtype=np.int64)
    for prefix, _ in prepared.train:
        store = TokenStore(prefix)
        found = np.bincount(store.read(0, min(store.tokens, COUNTED)), minlength=len(counts))
        counts += found[: len(counts)]
    commonest, hits, total = int(counts.argmax()), 0, 0
    for batch in _batches(parts):
        labels = batch["labels"][batch["labels"] != IGNORE]
        hits, total = hits + int((labels == commonest).sum()), total + len(labels)
    entries = [(OURS, values["heldout_accuracy"]), ("the commonest token", hits / max(total, 1))]
    return Score("accuracy", "Share of masked tokens of held-out text that are guessed.", False, entries)


def against_untrained(parts: Parts, values: dict[str, float]) -> Score:
    """Held-out loss beside that of the model before its first step."""
    entries = [(OURS, values["heldout_loss"])]
    begun = [e for e in read_events(parts.folder) if e.get("kind") == "eval" and e.get("step") == 0]
    if begun:
        entries.append(("untrained", float(begun[-1]["heldout_loss"])))
    return Score("held-out loss", "Nats a token of targets of held-out text.", True, entries)


def image_accuracy(parts: Parts, values: dict[str, float]) -> Score:
    """Share of held-out images that are named rightly, beside logistic regression on their pixels."""
    entries = [(OURS, values["heldout_accuracy"])]
    train, test = (_images(parts, heldout) for heldout in (False, True))
    baseline = logistic_accuracy(train["pixels"], train["label"], test["pixels"], test["label"])
    if baseline is not None:
        entries.append(("logistic regression", baseline))
    return Score("accuracy", "Share of held-out images that are named rightly.", False, entries)


def patch_error(parts: Parts, values: dict[str, float]) -> Score:
    """Squared error of hidden patches, beside predicting the mean patch."""
    job = parts.job
    train, test = (_images(parts, heldout)["pixels"] for heldout in (False, True))
    means = mean_patch_error(train, test, job.model.vision.patch, job.objective.mae.normalise)
    entries = [
        (OURS, values["heldout_loss"]),
        ("mean image", means.placed),
        ("mean patch", means.one),
    ]
    of = "normalised pixels" if job.objective.mae.normalise else "pixels"
    return Score("reconstruction error", f"Mean squared error of {of} of hidden patches.", True, entries)


SCORES: dict[str, Callable[[Parts, dict[str, float]], Score | None]] = {
    "causal": bits,
    "prefix": against_untrained,
    "masked": masked_accuracy,
    "spans": against_untrained,
    "ul2": against_untrained,
    "pairs": against_untrained,
    "classify": image_accuracy,
    "mae": patch_error,
}

_CHUNK, _MOST = 256, 20_000
"""Samples read at once, and samples of a side that a baseline reads at most."""


def _heldout_rows(parts: Parts) -> Iterator[Rows]:
    for samples in parts.dataset.heldout:
        count = min(len(samples), _MOST)
        for first in range(0, count, _CHUNK):
            yield heldout_rows(samples, np.arange(first, min(first + _CHUNK, count)))


def _batches(parts: Parts) -> Iterator[Batch]:
    return (parts.engine.objective.collate(rows) for rows in _heldout_rows(parts))


def _images(parts: Parts, heldout: bool) -> Rows:
    """Images of one side, as they are: neither augmented nor mixed."""
    job, found = parts.job, []
    labelled = job.objective.name == "classify"
    for source in parts.dataset.images:
        numbers = source.side(heldout, labelled)[:_MOST]
        indices = np.arange(numbers.size)
        if numbers.size:
            samples = ImageSamples(source, numbers, job.data.images, None, labelled)
            found.append(samples.rows(indices, indices))
    return {name: np.concatenate([rows[name] for rows in found]) for name in found[0]}
