"""Where each image lies within tar shards and Parquet tables: read once, kept in the cache, then read by place.

WebDataset shards stay as they are; their headers are read once. Parquet can only be read by whole row groups, which
a shuffled order would read again for every image, so the encoded bytes are copied once into one flat file of the
cache: as much disk as the tables' images take.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headway.pretrain.data.cache import build_once, fingerprint
from headway.pretrain.data.samples import Ints
from headway.pretrain.data.text import File
from headway.pretrain.errors import DataError

FORMAT = 1
"""Part of every fingerprint: raise it when the same files give another index."""
EXTENSIONS = ("jpg", "jpeg", "png", "ppm", "pgm", "bmp", "tif", "tiff", "webp", "gif")
"""Of files and members that are images."""
READ_ROWS = 64
"""Rows of a Parquet table that are held at once."""
_member = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")


Entry = tuple[str, int, int, int, str | None]
"""Name, number of the file, start, size and class of an image."""


@dataclass(frozen=True)
class Index:
    """Images in their order.

    Attributes:
        names: what they are called, the same on every machine.
        files: number of the file that holds each, int64 [N].
        starts, sizes: where its bytes begin, and how many they are, int64 [N].
        labels: a class each, as text; None if there is none.
        classes: names of the classes 0, 1, ... that the labels count, if the files tell.
    """

    names: list[str]
    files: Ints
    starts: Ints
    sizes: Ints
    labels: list[str | None]
    classes: list[str] | None


def index_tars(files: Sequence[File], label: str, cache: Path) -> Index:
    """Images of WebDataset shards, by their members' headers.

    Members of one name up to the first dot are one sample: an image, and a class as text in the member of the
    extension `label`, else `cls`.

    Args:
        cache: folder of what is built.

    Raises:
        DataError: a shard is truncated, compressed or no tar file, or a sample holds two images.
    """

    def build(folder: Path) -> None:
        samples = (
            (i, sample) for i, file in enumerate(files) for sample in _samples_of_tar(file.path, label)
        )
        _save(folder, [(name, i, start, size, text) for i, (name, start, size, text) in samples], None)

    return _load(files, build, cache, kind="tar", label=label)


def _samples_of_tar(path: Path, label: str) -> Iterator[tuple[str, int, int, str | None]]:
    """Name, start, size and class of each image of a shard, in the order of the members."""
    found: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(path, "r:", errors="backslashreplace") as tar:
            for member in tar:
                parts = _member.fullmatch(member.name)
                if parts and member.isreg():
                    found.setdefault(parts[1], {})[parts[2].lower()] = member
            size = path.stat().st_size
            for members in found.values():
                images = [m for extension, m in members.items() if extension in EXTENSIONS]
                if len(images) > 1:
                    names = " and ".join(m.name for m in images)
                    raise DataError(
                        f"{path}: {names} are two images of one sample; give them names of their own"
                    )
                for image in images:
                    if image.offset_data + image.size > size:
                        raise DataError(f"{path}: truncated within {image.name}")
                    yield (
                        image.name.removeprefix("./"),
                        image.offset_data,
                        image.size,
                        _text(tar, members, label, path),
                    )
    except (tarfile.TarError, OSError, EOFError) as fault:
        hint = " (compressed shards cannot be read by place: decompress them)" if _is_compressed(path) else ""
        raise DataError(f"{path}: cannot be read as a tar file{hint}: {fault}") from fault


def _text(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], label: str, path: Path) -> str | None:
    member = members.get(label.lower()) or members.get("cls")
    stream = tar.extractfile(member) if member else None
    if member is None or stream is None:
        return None
    try:
        return stream.read().decode().strip() or None
    except UnicodeDecodeError as fault:
        raise DataError(f"{path}: {member.name}: a class must be text: {fault}") from fault


def _is_compressed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))


def pack_tables(files: Sequence[File], column: str, label: str, cache: Path) -> tuple[Index, Path]:
    """Encoded images of Parquet tables, copied into one file of the cache.

    Args:
        column: holds bytes, or Hugging Face's struct of `bytes` and `path`; a row without is an empty image.
        label: column of integers or strings; there may be none.

    Returns:
        The index, whose one file is the path.

    Raises:
        DataError: a table cannot be read, or its columns hold something else.
    """

    def build(folder: Path) -> None:
        entries: list[Entry] = []
        classes = [_check_table(file.path, column, label) for file in files]
        if others := [file.path for file, names in zip(files, classes, strict=True) if names != classes[0]]:
            raise DataError(f"{others[0]}: names its classes otherwise than {files[0].path}")
        with (folder / "images.bin").open("wb") as out:
            for file in files:
                for row, (data, text) in enumerate(_rows_of_table(file.path, column, label)):
                    entries.append((f"{file.name}:{row}", 0, out.tell(), len(data), text))
                    out.write(data)
            out.flush()
            os.fsync(out.fileno())
        _save(folder, entries, classes[0])

    parts = {"kind": "parquet", "column": column, "label": label}
    return _load(files, build, cache, **parts), _folder(files, cache, **parts) / "images.bin"


def _check_table(path: Path, column: str, label: str) -> list[str] | None:
    """Names of the classes, where Hugging Face's `datasets` wrote the file; DataError if a column does not fit."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowException) as fault:
        raise DataError(f"{path}: cannot be read as Parquet: {fault}") from fault
    if column not in schema.names:
        known = ", ".join(schema.names)
        raise DataError(f"{path}: no column {column!r}; it has {known} (data.images.column)")
    kind = schema.field(column).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise DataError(f"{path}: column {column!r} holds {kind}, not encoded images (data.images.column)")
    if label in schema.names:
        kind = schema.field(label).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(
                f"{path}: column {label!r} holds {kind}, not integers or text (data.images.label)"
            )
    try:
        return json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None


def _rows_of_table(path: Path, column: str, label: str) -> Iterator[tuple[bytes, str | None]]:
    """Encoded image and class of each row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            labelled = label in table.schema_arrow.names
            for batch in table.iter_batches(READ_ROWS, columns=[column] + [label] * labelled):
                values = batch.column(column).to_pylist()
                texts = batch.column(label).to_pylist() if labelled else [None] * len(values)
                for value, text in zip(values, texts, strict=True):
                    data = value["bytes"] if isinstance(value, dict) else value
                    yield data or b"", None if text is None else str(text)
    except (OSError, pa.ArrowException) as fault:
        raise DataError(f"{path}: cannot be read as Parquet: {fault}") from fault


def _folder(files: Sequence[File], cache: Path, **parts: str) -> Path:
    content = [(str(file.path.absolute()), file.name, file.size, file.mtime_ns) for file in files]
    return cache / "images" / fingerprint(format=FORMAT, files=content, **parts)


def _load(files: Sequence[File], build: Callable[[Path], None], cache: Path, **parts: str) -> Index:
    """The index of these files, built unless it is in the cache."""
    import pyarrow.parquet as pq

    folder = _folder(files, cache, **parts)
    build_once(folder, build)
    table = pq.read_table(folder / "index.parquet")
    places, starts, sizes = (table[name].to_numpy().astype(np.int64) for name in ("file", "start", "size"))
    classes = json.loads(table.schema.metadata[b"classes"])
    return Index(table["name"].to_pylist(), places, starts, sizes, table["label"].to_pylist(), classes)


def _save(folder: Path, entries: Sequence[Entry], classes: list[str] | None) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number = pa.string(), pa.int64()
    kinds = {"name": text, "file": number, "start": number, "size": number, "label": text}
    columns = zip(*entries, strict=True) if entries else [()] * len(kinds)
    arrays = {
        name: pa.array(column, kind) for (name, kind), column in zip(kinds.items(), columns, strict=True)
    }
    table = pa.table(arrays).replace_schema_metadata({"classes": json.dumps(classes)})
    with (folder / "index.parquet").open("wb") as out:
        pq.write_table(table, out)
        out.flush()
        os.fsync(out.fileno())
