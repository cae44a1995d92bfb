"""Documents out of files: plain text, JSON lines and Parquet, text and lines also as `.gz` or `.zst`.

A source becomes a sorted list of `File`s, these are cut into `Block`s of about 256 KiB, which can be sent
to another process, and a block is read into `Document`s. Nothing larger than a block is held, except a plain
text file, which is one document.
"""

from __future__ import annotations

import glob
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from headway.pretrain.data.corpus import stdlib_sources
from headway.pretrain.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from headway.pretrain import config

BLOCK_BYTES = 1 << 18
"""Size of a block: small enough that a few megabytes keep several processes busy."""
BLOCK_FILES = 1024
"""Most files of a block of text files."""
BLOCK_ROWS = 256
"""Rows of a block of a Parquet table."""


_has_surrogate = re.compile("[\ud800-\udfff]").search


@dataclass(frozen=True)
class File:
    """A file of a source.

    Attributes:
        path: where it is.
        name: its path relative to what the source names, the same on every machine.
    """

    path: Path
    name: str
    size: int
    mtime_ns: int

    @property
    def compression(self) -> str:
        return self.path.suffix if self.path.suffix in (".gz", ".zst") else ""

    @property
    def format(self) -> str:
        """`lines` (.jsonl, .ndjson, .json: one object a line), `table` (.parquet) or `text` (all else)."""
        suffix = Path(self.path.name.removesuffix(self.compression)).suffix
        return {".jsonl": "lines", ".ndjson": "lines", ".json": "lines", ".parquet": "table"}.get(
            suffix, "text"
        )


@dataclass(frozen=True)
class Document:
    """A text, its `name` (`FILE` or `FILE:LINE`, relative to the source) and the path to show to people.

    Attributes:
        target: the other text of a pair.
    """

    name: str
    where: str
    text: str
    target: str | None = None


@dataclass(frozen=True)
class Malformed:
    """A line, row or file that is not a document, and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class Block:
    """A piece of work.

    Attributes:
        files: several whole text files, or the one file that `rows` are from.
        rows: lines of JSON, or values of a Parquet column (pairs: of two columns); None for text files.
        first: line or row number of the first row, from 1.
        cost: bytes on disk that the block stands for.
    """

    files: tuple[File, ...]
    cost: int
    rows: bytes | list[Any] | None = None
    first: int = 1


def find_files(source: config.Source) -> list[File]:
    """Files of a source, sorted by name.

    Raises:
        DataError: the path does not exist, the glob matches nothing, the folder holds no file.
    """
    named = os.path.expanduser(source.path)
    if source.path == "stdlib:":
        found = list(stdlib_sources())
    elif os.path.isdir(named):
        found = list(_files_of_folder(Path(named)))
    elif os.path.exists(named):
        found = [(Path(named), os.path.basename(named))]
    elif glob.has_magic(named):
        found = list(_files_of_glob(named))
    else:
        raise DataError(f"{source.path}: no such file, folder or token store (data.sources)")
    if not found:
        raise DataError(f"{source.path}: no file there (data.sources)")
    found.sort(key=lambda pair: pair[1])
    return [File(path, name, (status := path.stat()).st_size, status.st_mtime_ns) for path, name in found]


def _files_of_folder(root: Path) -> Iterator[tuple[Path, str]]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            if path.is_file():
                yield path, path.relative_to(root).as_posix()


def _files_of_glob(pattern: str) -> Iterator[tuple[Path, str]]:
    """Matches, named relative to the folder in front of the first wildcard."""
    fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts))
    for match in glob.iglob(pattern, recursive=True):
        if os.path.isfile(match):
            yield Path(match), Path(match).relative_to(fixed).as_posix()


def cut_into_blocks(files: Sequence[File], column: str, target: str | None = None) -> Iterator[Block]:
    """Pieces of work of about `BLOCK_BYTES`, in order.

    Args:
        column: the Parquet column that holds the text.
        target: the one that holds the target, for pairs of texts.

    Raises:
        DataError: a file cannot be read, is damaged, its table lacks the column, or it cannot hold pairs.
    """
    texts: list[File] = []
    size = 0
    for file in files:
        if target is not None and file.format == "text":
            rule = f"plain text has no field {target!r}: pairs are read from .jsonl and .parquet"
            raise DataError(f"{file.path}: {rule} (data.sources[].target)")
        if file.format == "text":
            texts.append(file)
            size += file.size
        if texts and (file.format != "text" or size >= BLOCK_BYTES or len(texts) == BLOCK_FILES):
            yield Block(tuple(texts), size)
            texts, size = [], 0
        if file.format == "lines":
            yield from _blocks_of_lines(file)
        elif file.format == "table":
            yield from _blocks_of_table(file, (column,) if target is None else (column, target))
    if texts:
        yield Block(tuple(texts), size)


def _blocks_of_lines(file: File) -> Iterator[Block]:
    line, done = 1, 0
    try:
        with file.path.open("rb") as raw, _decompress(raw, file.compression) as stream:
            while rows := stream.read(BLOCK_BYTES):
                rows += stream.readline()
                place = raw.tell()
                yield Block((file,), place - done, rows, line)
                line, done = line + rows.count(b"\n"), place
    except (OSError, EOFError, zlib.error) as fault:
        raise DataError(f"{file.path}: cannot be read after line {line - 1}: {fault}") from fault


def _blocks_of_table(file: File, columns: Sequence[str]) -> Iterator[Block]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file.path) as table:
            total = table.metadata.num_rows
            for column in columns:
                _check_column(file, table.schema_arrow, column)
            row = 1
            for batch in table.iter_batches(BLOCK_ROWS, columns=list(dict.fromkeys(columns))):
                share = file.size * len(batch) // total
                values = [batch.column(column).to_pylist() for column in columns]
                rows = values[0] if len(columns) == 1 else list(zip(*values, strict=True))
                yield Block((file,), share, rows, row)
                row += len(batch)
    except (OSError, pa.ArrowException) as fault:
        raise DataError(f"{file.path}: cannot be read as Parquet: {fault}") from fault


def _check_column(file: File, schema: pa.Schema, column: str) -> None:
    """DataError if a table lacks this column of text."""
    import pyarrow as pa

    if column not in schema.names:
        known = ", ".join(schema.names)
        raise DataError(f"{file.path}: no column {column!r}; it has {known} (data.sources[].column)")
    kind = schema.field(column).type
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(values) or pa.types.is_large_string(values)):
        raise DataError(f"{file.path}: column {column!r} holds {kind}, not text (data.sources[].column)")


def _decompress(raw: IO[bytes], compression: str) -> IO[bytes]:
    """A stream of the content; reading it raises OSError, EOFError or zlib.error if it is damaged."""
    if compression == ".gz":
        return gzip.open(raw)  # type: ignore[return-value]
    if compression == ".zst":
        import pyarrow as pa  # python-zstandard's reader takes a truncated file for a finished one

        return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))
    return raw


def read_documents(block: Block, column: str, target: str | None = None) -> Iterator[Document | Malformed]:
    """Documents of a block in order; empty ones and blank lines are left out. An empty text in a pair is malformed.

    Args:
        column: field of the JSON objects that holds the text.
        target: field that holds the target, for pairs of texts; the block was cut with it.

    Raises:
        DataError: a text file cannot be read or decompressed.
    """
    if block.rows is None:
        for file in block.files:
            yield from _as_document(file.name, str(file.path), _content(file))
        return
    file = block.files[0]
    rows = block.rows.split(b"\n") if isinstance(block.rows, bytes) else block.rows
    for number, row in enumerate(rows, block.first):
        name, where = f"{file.name}:{number}", f"{file.path}:{number}"
        if isinstance(block.rows, bytes):
            yield from _parse_line(name, where, row, column, target)
        elif target is None:
            yield from _as_document(name, where, row)
        else:
            yield _as_pair(name, where, zip((column, target), row, strict=True))


def _content(file: File) -> bytes:
    try:
        with file.path.open("rb") as raw, _decompress(raw, file.compression) as stream:
            return stream.read()
    except (OSError, EOFError, zlib.error) as fault:
        raise DataError(f"{file.path}: cannot be read: {fault}") from fault


def _parse_line(
    name: str, where: str, line: bytes, column: str, target: str | None
) -> Iterator[Document | Malformed]:
    if not line.strip():
        return
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as fault:
        yield Malformed(where, f"not UTF-8: {fault}")
    except ValueError as fault:
        yield Malformed(where, f"not JSON: {fault}")
    except RecursionError:
        yield Malformed(where, "not JSON that can be read: nested too deeply")
    else:
        if not isinstance(row, dict):
            yield Malformed(where, f"not a JSON object but {type(row).__name__}")
            return
        columns = (column,) if target is None else (column, target)
        if missing := [each for each in columns if each not in row]:
            known = ", ".join(map(repr, row)) or "none"
            yield Malformed(where, f"no field {missing[0]!r}; the object has {known}")
        elif target is None:
            yield from _as_document(name, where, row[column])
        else:
            yield _as_pair(name, where, ((each, row[each]) for each in columns))


def _as_pair(name: str, where: str, fields: Iterable[tuple[str, object]]) -> Document | Malformed:
    """A document with its target, if the values of both fields are texts and not empty."""
    texts = []
    for column, value in fields:
        read = next(_as_document(name, where, value), Malformed(where, "the text is empty"))
        if isinstance(read, Malformed):
            return Malformed(where, f"field {column!r}: {read.reason}")
        texts.append(read.text)
    return Document(name, where, *texts)


def _as_document(name: str, where: str, value: object) -> Iterator[Document | Malformed]:
    """A document if the value is text that has a UTF-8 form."""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as fault:
            yield Malformed(where, f"not UTF-8: {fault}")
            return
    if not isinstance(value, str):
        yield Malformed(where, f"the text is not a string but {type(value).__name__}")
    elif not value.isascii() and _has_surrogate(value):
        yield Malformed(where, "the text holds half of a surrogate pair, which has no UTF-8 form")
    elif value:
        yield Document(name, where, value)
