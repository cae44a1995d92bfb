"""From sources to token stores: train a tokenizer, encode in parallel, publish, reuse.

Every source becomes a pair of stores, `train` and `heldout`, in a folder of the cache that is named by a
fingerprint of the files, the tokenizer and the settings. Which side a document is on depends on its name
alone, and the content of a store does not depend on the number of processes that built it. A source of pairs
(`target` is set) has two more, `train.target` and `heldout.target`, whose document i is the target of document
i of `train` and `heldout`.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from headway.pretrain import config
from headway.pretrain.data.cache import build_once, fingerprint
from headway.pretrain.data.store import TokenStore, TokenStoreWriter, check_tokenizer, is_store
from headway.pretrain.data.text import Document, File, Malformed, cut_into_blocks, find_files, read_documents
from headway.pretrain.data.tokenizer import Tokenizer, load_tokenizer
from headway.pretrain.data.tokenizer_training import train_sentencepiece
from headway.pretrain.data.workers import Work, encode_blocks, is_heldout
from headway.pretrain.errors import DataError, JobError
from headway.pretrain.files import cache_folder

FORMAT = 1
"""Part of every fingerprint: raise it when the same input gives another store or tokenizer."""
REPORTED = 20
"""Malformed lines that are named one by one; all are counted."""
ALONE_BYTES = 1 << 20
"""Sources below this size are built by this process: starting others takes longer."""


@dataclass
class Built:
    """The stores of a source.

    Attributes:
        train, heldout: prefixes; `heldout` is None if no document is kept out.
        train_target, heldout_target: prefixes of the targets' stores; None if the source has no pairs.
        reused: they were there.
        skipped: malformed lines that were left out.
        skipped_first: the first of them, `FILE:LINE: reason`.
    """

    train: Path
    heldout: Path | None
    reused: bool = True
    skipped: int = 0
    skipped_first: list[str] = field(default_factory=list)
    train_target: Path | None = None
    heldout_target: Path | None = None


@dataclass
class Prepared:
    """All that training needs to know of its data.

    Attributes:
        train: (prefix, weight) of each source.
        heldout: prefixes, in the order of the sources.
        built: what was built or reused, a source that is a store left out.
        tokenizer_path: the tokenizer's file, if it has one.
        train_targets, heldout_targets: prefixes of the targets of `train` and `heldout`, one for one; None
            where a source has no pairs.
    """

    tokenizer: Tokenizer
    train: list[tuple[Path, float]]
    heldout: list[Path]
    built: list[Built] = field(default_factory=list)
    tokenizer_path: Path | None = None
    train_targets: list[Path | None] = field(default_factory=list)
    heldout_targets: list[Path | None] = field(default_factory=list)


def prepare_data(data: config.Data, progress: bool = True) -> Prepared:
    """Train the tokenizer if none is named, and build the stores, as far as they are not in the cache.

    Args:
        progress: show bars on standard error.

    Raises:
        DataError: data is missing, empty or malformed, or a store was written with another tokenizer.
        JobError: the tokenizer is not known, or does not fit.
    """
    stores = [_store_of(source) for source in data.sources]
    files = {i: find_files(data.sources[i]) for i, store in enumerate(stores) if store is None}
    path = None
    if data.tokenizer.kind == "sentencepiece" and data.tokenizer.path is None:
        path = train_tokenizer(data, progress=progress)
    elif data.tokenizer.path is not None:
        path = Path(data.tokenizer.path).expanduser()
    prepared = Prepared(load_tokenizer(data.tokenizer, path), [], [], tokenizer_path=path)
    for i, (source, store) in enumerate(zip(data.sources, stores, strict=True)):
        if store is None:
            built = build_store(source, prepared.tokenizer, data, files[i], progress=progress)
            prepared.built.append(built)
            store = built.train
            prepared.heldout += [built.heldout] if built.heldout else []
            prepared.heldout_targets += [built.heldout_target] if built.heldout else []
        target = None if source.target is None else _target_of(store)
        for each in (store, target) if target else (store,):
            check_tokenizer(TokenStore(each), prepared.tokenizer)
        prepared.train.append((store, source.weight))
        prepared.train_targets.append(target)
    return prepared


def build_store(
    source: config.Source,
    tokenizer: Tokenizer,
    data: config.Data,
    files: Sequence[File] | None = None,
    folder: Path | None = None,
    progress: bool = True,
) -> Built:
    """Build the stores of one source, or find them built.

    Args:
        data: `heldout`, `on_error`, `workers` and `cache` are read.
        files: of the source; found if not given.
        folder: where `train` and `heldout` go; a place in the cache if not given.

    Raises:
        DataError: no training document, malformed input, `folder` exists and holds something else.
    """
    files = find_files(source) if files is None else files
    mark = _mark(files, source, data, digest=tokenizer.digest)
    if folder is None:
        folder = cache_folder(data.cache) / "stores" / mark
    elif folder.exists() and _mark_of(folder) != mark:
        raise DataError(f"{folder}: exists and was not built from this; name another folder, or remove it")
    fresh = build_once(folder, lambda place: _write(place, source, tokenizer, data, files, mark, progress))
    facts = TokenStore(folder / "train").facts
    train, heldout = folder / "train", folder / "heldout"
    paired, kept = source.target is not None, is_store(heldout)
    return Built(
        train=train,
        heldout=heldout if kept else None,
        train_target=_target_of(train) if paired else None,
        heldout_target=_target_of(heldout) if paired and kept else None,
        reused=not fresh,
        skipped=facts["skipped"],
        skipped_first=facts["skipped_first"],
    )


def train_tokenizer(data: config.Data, out: Path | None = None, progress: bool = True) -> Path:
    """Train the SentencePiece model that `data.tokenizer` describes, on training documents only.

    Args:
        out: the `.model` file to write; a place in the cache, reused if it is there, if not given.

    Returns:
        Path of the `.model` file.

    Raises:
        JobError: every source is a token store, so there is no text; the vocabulary does not fit the text.
        DataError: there is no text, or it is malformed.
    """
    sources = [source for source in data.sources if _store_of(source) is None]
    if not sources:
        rule = "the sources are token stores, which need the tokenizer that wrote them: name its file"
        raise JobError("data.tokenizer.path", data.tokenizer.path, rule)
    files = [find_files(source) for source in sources]
    settings = data.tokenizer

    def train(path: Path) -> None:
        texts = _training_texts(sources, files, data)
        with _console(progress).status(f"training a tokenizer of {settings.vocab:,} pieces"):
            train_sentencepiece(texts, settings.vocab, path, settings.span)

    if out is not None:
        train(out)
        return out
    marks = [_mark(of_source, source, data) for source, of_source in zip(sources, files, strict=True)]
    weights = [source.weight for source in sources]
    mark = fingerprint(marks=marks, weights=weights, settings=settings.model_dump())
    folder = cache_folder(data.cache) / "tokenizers" / mark
    build_once(folder, lambda place: train(place / "tokenizer.model"))
    return folder / "tokenizer.model"


def heldout_bytes(prefixes: Sequence[Path], tokenizer: Tokenizer) -> bytes:
    """The held-out documents' text, byte for byte, in the order of the stores.

    Raises:
        DataError: a tokenizer that changes text does not give back as many bytes as went in.
    """
    texts = []
    for prefix in prefixes:
        store = TokenStore(prefix)
        check_tokenizer(store, tokenizer)
        documents = (tokenizer.decode(store.document(i)[:-1]).encode() for i in range(store.documents))
        texts.append(b"".join(documents))
        if len(texts[-1]) != store.facts.get("utf8_bytes", len(texts[-1])):
            rule = f"{store.facts['utf8_bytes']} bytes went in, {len(texts[-1])} come out"
            raise DataError(f"{prefix}: the tokenizer is lossy, so bits per byte have no meaning: {rule}")
    return b"".join(texts)


def _store_of(source: config.Source) -> Path | None:
    """The prefix, if the source is a token store."""
    path = Path(source.path).expanduser()
    if path.suffix in (".bin", ".idx") and is_store(path.with_suffix("")):
        raise JobError(
            "data.sources", source.path, "a token store is named without .bin or .idx", path.with_suffix("")
        )
    if is_store(path) and source.target is not None and not is_store(_target_of(path)):
        rule = f"a token store of pairs has its targets beside it, and there is no {_target_of(path)}.idx"
        raise JobError("data.sources[].target", source.target, f"{source.path}: {rule}")
    return path if is_store(path) else None


def _target_of(prefix: Path) -> Path:
    """Prefix of the store that holds the targets of a store's documents."""
    return prefix.with_name(f"{prefix.name}.target")


def _mark_of(folder: Path) -> str | None:
    """The fingerprint of what was built there, if anything was."""
    return TokenStore(folder / "train").facts.get("mark") if is_store(folder / "train") else None


def _mark(files: Sequence[File], source: config.Source, data: config.Data, **more: str) -> str:
    """Fingerprint of a source's content, as far as it can be told without reading it, and of its settings."""
    content = [(str(file.path.absolute()), file.name, file.size, file.mtime_ns) for file in files]
    settings: dict[str, Any] = {
        "column": source.column,
        "heldout": data.heldout,
        "on_error": data.on_error,
    }
    if source.target is not None:  # else as it was before there were pairs, so that what is cached is found
        settings["target"] = source.target
    return fingerprint(format=FORMAT, files=content, **settings, **more)


def _write(
    folder: Path,
    source: config.Source,
    tokenizer: Tokenizer,
    data: config.Data,
    files: Sequence[File],
    mark: str,
    progress: bool,
) -> None:
    """Encode the files into `folder/train` and `folder/heldout`, and the targets of pairs beside them."""
    total = sum(file.size for file in files)
    workers = (data.workers or len(os.sched_getaffinity(0))) if total >= ALONE_BYTES else 1
    work = Work(tokenizer, source.column, data.heldout, data.on_error == "skip", source.target)
    sides = {name: TokenStoreWriter(folder / name, tokenizer.vocab) for name in work.sides}
    utf8_bytes = dict.fromkeys(sides, 0)
    skipped: list[Malformed] = []
    count = 0
    with _bar(progress) as bar:
        task = bar.add_task(f"encoding {source.path}", total=total)
        blocks = cut_into_blocks(files, source.column, source.target)
        for encoded in encode_blocks(blocks, work, workers):
            for name, side in encoded.sides.items():
                sides[name].add_many(side.stream, side.lengths)
                utf8_bytes[name] += side.utf8_bytes
            count += len(encoded.skipped)
            skipped += encoded.skipped[: REPORTED - len(skipped)]
            bar.advance(task, encoded.cost)
    if not sides["train"].documents:
        found = sides["heldout"].documents
        rule = (
            f"all {found} are held out; lower data.heldout = {data.heldout}"
            if found
            else "the files hold none"
        )
        raise DataError(
            f"{source.path}: no document to train on: {rule} ({count} malformed lines were skipped)"
        )
    facts = {"digest": tokenizer.digest, "vocab": tokenizer.vocab, "separator": tokenizer.separator}
    facts |= {"source": source.path, "mark": mark, "skipped": count}
    facts |= {"skipped_first": [f"{line.where}: {line.reason}" for line in skipped]}
    for name, writer in sides.items():
        writer.close(**facts, utf8_bytes=utf8_bytes[name])
        if not writer.documents:
            for suffix in (".bin", ".idx", ".json"):
                (folder / f"{name}{suffix}").unlink()


def _training_texts(
    sources: Sequence[config.Source], files: Sequence[Sequence[File]], data: config.Data
) -> Iterator[str]:
    """Training documents for the tokenizer, `data.tokenizer.train_bytes` at most, from all sources by weight.

    A source smaller than its share leaves the rest to larger ones; so does a file within its source, and of
    a larger file the head is read.
    """
    left = data.tokenizer.train_bytes
    order = sorted(
        zip(sources, files, strict=True), key=lambda pair: sum(f.size for f in pair[1]) / pair[0].weight
    )
    for i, (source, of_source) in enumerate(order):
        share = int(left * source.weight / sum(later.weight for later, _ in order[i:]))
        by_size = sorted(of_source, key=lambda file: (file.size, file.name))
        for j, file in enumerate(by_size):
            for text in _head(file, source, data, share // (len(by_size) - j)):
                left -= len(text)
                share -= len(text)
                yield text.decode(errors="ignore")


def _head(file: File, source: config.Source, data: config.Data, limit: int) -> Iterator[bytes]:
    """UTF-8 bytes of the first training documents of a file, and of their targets, `limit` at most."""
    blocks = cut_into_blocks([file], source.column, source.target)
    documents = (read_documents(block, source.column, source.target) for block in blocks)
    for item in itertools.chain.from_iterable(documents):
        if limit <= 0:
            return
        if isinstance(item, Document):
            if is_heldout(item.name, data.heldout):
                continue
            for whole in (item.text, item.target or ""):
                if text := whole.encode()[: max(0, limit)]:
                    yield text
                    limit -= len(text)
        elif data.on_error == "stop":
            rule = "mend it, or leave such lines out with data.on_error=skip"
            raise DataError(f"{item.where}: {item.reason}; {rule}")


def _console(progress: bool) -> Console:
    return Console(file=sys.stderr, quiet=not progress)


def _bar(progress: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=_console(progress), disable=not progress)
