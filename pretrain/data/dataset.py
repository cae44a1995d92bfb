"""From a job to its samples: what a run reads, whatever its family, and what that tells the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from headway.pretrain.config import Job
from headway.pretrain.data.build import Prepared, prepare_data
from headway.pretrain.data.corruption import denoisers, spans
from headway.pretrain.data.heldout import HeldoutRows
from headway.pretrain.data.images.samples import ImageSamples
from headway.pretrain.data.images.source import ImageSource
from headway.pretrain.data.images.sources import open_images
from headway.pretrain.data.samples import Samples
from headway.pretrain.data.segments import SegmentPairs, line_ends
from headway.pretrain.data.specials import Specials, assign, word_starts
from headway.pretrain.data.store import TokenStore
from headway.pretrain.data.text_pairs import TextPairs
from headway.pretrain.data.token_rows import TokenRows
from headway.pretrain.data.tokenizer import Tokenizer
from headway.pretrain.errors import DataError
from headway.pretrain.models.inputs import Inputs


@dataclass
class Dataset:
    """All that a run knows of its data.

    Attributes:
        inputs: what the model is told.
        train: (name, samples, weight) of each source.
        heldout: held-out samples of the sources that have some.
        notes: what people should know, a line each.
        specials: ids of special tokens, of text.
        starts: bool [V], pieces that begin a word, where words are masked whole.
        prepared: tokenizer and stores, of text.
        images: the sources, of images.
    """

    inputs: Inputs
    train: list[tuple[str, Samples, float]]
    heldout: list[Samples]
    notes: list[str] = field(default_factory=list)
    specials: Specials | None = None
    starts: np.ndarray | None = None
    prepared: Prepared | None = None
    images: list[ImageSource] = field(default_factory=list)

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.prepared.tokenizer if self.prepared else None


def open_dataset(job: Job, progress: bool = True) -> Dataset:
    """Build what is missing of tokenizer and stores, and open all sources.

    Raises:
        DataError: data is missing, empty or malformed.
        JobError: settings that the data does not allow.
    """
    return _images(job) if job.model.family == "vit" else _text(job, progress)


def _text(job: Job, progress: bool) -> Dataset:
    prepared = prepare_data(job.data, progress=progress)
    tokenizer = prepared.tokenizer
    specials = assign(tokenizer, job.objective)
    length, target = row_lengths(job)
    inputs = Inputs(vocab=specials.vocab, length=job.data.seq_len, target_length=target)
    make = _maker(job, inputs, specials, tokenizer, length)
    found = Dataset(inputs, [], [], specials=specials, prepared=prepared)
    if job.objective.masking.unit == "word" and job.objective.name == "masked":
        found.starts = word_starts(tokenizer, specials)
    targets = prepared.train_targets
    for source, (prefix, weight), beside in zip(job.data.sources, prepared.train, targets, strict=True):
        store = TokenStore(prefix)
        found.train.append((source.path, make(store, beside, source.path), weight))
        found.notes.append(f"data {source.path}: {store.documents:,} documents, {store.tokens:,} tokens")
    for prefix, beside in zip(prepared.heldout, prepared.heldout_targets, strict=True):
        try:
            found.heldout.append(_heldout(job, tokenizer, make, prefix, beside))
        except DataError as fault:  # too little to fill a row: the run goes on without
            found.notes.append(f"held-out data is not used: {fault}")
    for built in prepared.built:
        if built.skipped:
            found.notes.append(f"left out {built.skipped} malformed lines: {'; '.join(built.skipped_first)}")
    for name, samples, _ in found.train:
        if left_out := getattr(samples, "left_out", 0):
            first = "; ".join(getattr(samples, "left_out_first", [])[:3])
            found.notes.append(f"left out {left_out} documents of {name} that do not fit a row {first}")
    return found


def row_lengths(job: Job) -> tuple[int, int]:
    """Tokens of raw text in a row of the stream, and tokens of the decoder's row (0 without a decoder)."""
    name, length = job.objective.name, job.data.seq_len
    if name == "masked":
        return length - 2, 0  # [CLS] and [SEP]
    if job.model.family != "t5":
        return length, 0
    if name == "spans":
        raw, target = spans.lengths(length, job.objective.spans.rate, job.objective.spans.mean)
        return raw, target
    if name == "ul2":
        return denoisers.lengths(length, job.objective.denoisers)
    target = job.data.target_len or length
    return (min(length, target) if name == "prefix" else length), target


def _maker(
    job: Job, inputs: Inputs, specials: Specials, tokenizer: Tokenizer, length: int
) -> Callable[[TokenStore, Path | None, str], Samples]:
    """How a store becomes samples of this job: (store, prefix of its targets or None, name) -> samples."""
    masking, separator, vocab = job.objective.masking, tokenizer.separator, tokenizer.vocab
    ids = specials.ids

    def make(store: TokenStore, targets: Path | None, name: str) -> Samples:
        if job.objective.name == "pairs":
            if targets is None:
                raise DataError(f"{name}: a source of pairs names its target column (data.sources[].target)")
            sides = store, TokenStore(targets)
            lengths = inputs.length, inputs.target_length
            return TextPairs(*sides, *lengths, separator, ids["pad"], name, vocab)
        if job.objective.name == "masked" and masking.pairs != "none":
            breaks = line_ends(tokenizer)
            special = separator, ids["cls"], ids["sep"], ids["pad"]
            return SegmentPairs(store, inputs.length, masking.pairs, *special, name, vocab, breaks)
        return TokenRows(store, length, separator, vocab, name)

    return make


def _heldout(
    job: Job, tokenizer: Tokenizer, make: Callable[..., Samples], prefix: Path, targets: Path | None
) -> Samples:
    """Held-out samples: of causal models rows that score every token once, of others rows as in training."""
    store = TokenStore(prefix)
    if job.objective.name == "causal":
        overlap, name = job.train.eval_overlap, str(prefix)
        return HeldoutRows(store, job.data.seq_len, tokenizer.separator, overlap, tokenizer.vocab, name)
    return make(store, targets, str(prefix))


def _images(job: Job) -> Dataset:
    images, labelled = job.data.images, job.objective.name == "classify"
    found = Dataset(Inputs(), [], [])
    for source in job.data.sources:
        opened = open_images(source, job.data)
        found.images.append(opened)
        train = ImageSamples(opened, opened.side(False, labelled), images, job.objective.augment, labelled)
        found.train.append((source.path, train, source.weight))
        heldout = opened.side(True, labelled)
        if heldout.size:
            found.heldout.append(ImageSamples(opened, heldout, images, None, labelled))
        found.notes.append(
            f"data {source.path}: {len(train):,} images to train on, {heldout.size:,} held out"
        )
    names = found.images[0].classes
    for opened in found.images:
        if labelled and opened.classes != names:
            raise DataError(
                f"{opened.name}: has other classes than {found.images[0].name}; blend alike sources"
            )
    size, channels = images.size, images.channels
    found.inputs = Inputs(length=job.row_tokens, image=size, channels=channels, classes=len(names))
    return found
