"""The token store: documents as one memory-mapped stream of tokens, in the format of Megatron-LM.

`PREFIX.bin` holds the tokens of all documents one after another, `PREFIX.idx` says where each begins:
magic, version, dtype, counts, then the lengths of the sequences (int32), their byte offsets (int64) and the
first sequence of each document (int64) (`megatron/core/datasets/indexed_dataset.py`). `PREFIX.json` is ours,
and optional: which tokenizer wrote the store, and how many bytes of text went in.

Opening, and finding a place, cost the same for a megabyte and for a trillion tokens.
"""

from __future__ import annotations

import bisect
import json
import mmap
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from headway.pretrain.errors import DataError

if TYPE_CHECKING:
    from headway.pretrain.data.tokenizer import Tokenizer

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, code of the dtype, number of sequences, number of documents + 1."""
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    8: np.dtype(np.uint16),
}
ADVISED = hasattr(mmap, "MADV_RANDOM")
"""Whether the system can be told that rows are read at random. Untold, it reads as much around each page as
its read-ahead says (128 KiB to 8 MiB) for a row of 2 KiB; told, it reads what is asked, long rows at once."""
LONGEST = 2**31 - 1
"""Tokens of a document: its length is an int32."""


def dtype_of(vocab: int) -> np.dtype[Any]:
    """The dtype of a store for ids below `vocab`; Megatron's rule."""
    return np.dtype(np.uint16 if vocab < 65500 else np.int32)


def part(prefix: Path, suffix: str) -> Path:
    """`PREFIX.bin`, `.idx` or `.json`; a prefix may itself hold dots."""
    return prefix.parent / (prefix.name + suffix)


def is_store(path: str | Path) -> bool:
    """Whether the path, less `.bin` and `.idx`, names a token store."""
    return part(Path(path).expanduser(), ".idx").is_file()


class TokenStoreWriter:
    """Writes a store, document by document; a context manager. Nothing can open it before `close`.

    Args:
        prefix: path without `.bin`, `.idx`.
        vocab: all ids are below it; it sets the dtype.
    """

    def __init__(self, prefix: Path, vocab: int) -> None:
        self.prefix, self.dtype = prefix, dtype_of(vocab)
        self.documents = self.tokens = 0
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._bin = part(prefix, ".bin").open("wb")

    def add(self, tokens: npt.ArrayLike) -> None:
        """Append a document, its separator included."""
        array = np.asarray(tokens, self.dtype)
        self.add_many(array.tobytes(), np.array([array.size], np.int64))

    def add_many(self, stream: bytes, lengths: npt.NDArray[np.integer]) -> None:
        """Append documents.

        Args:
            stream: their tokens in the store's dtype, one after another.
            lengths: (documents,) tokens in each.

        Raises:
            DataError: a document is longer than an int32 can say.
            ValueError: the lengths do not add up to the stream.
        """
        tokens = int(lengths.sum())
        if tokens * self.dtype.itemsize != len(stream):
            raise ValueError(
                f"lengths say {tokens} tokens, the stream has {len(stream) / self.dtype.itemsize}"
            )
        if lengths.size and lengths.max() > LONGEST:
            raise DataError(f"{self.prefix}: a document of {lengths.max()} tokens; at most {LONGEST}, cut it")
        self._bin.write(stream)
        self._lengths.append(lengths.astype(np.int32))
        self.documents += lengths.size
        self.tokens += tokens

    def close(self, **facts: Any) -> None:
        """Write the index, and `facts` beside it as `PREFIX.json`; all is on disk afterwards."""
        _sync(self._bin)
        lengths = np.concatenate([np.zeros(0, np.int32), *self._lengths])
        with part(self.prefix, ".idx").open("wb") as index:
            code = next(code for code, dtype in DTYPES.items() if dtype == self.dtype)
            index.write(HEADER.pack(MAGIC, 1, code, lengths.size, lengths.size + 1))
            index.write(lengths.tobytes())
            ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            index.write(np.concatenate([np.zeros(1, np.int64), ends])[:-1].tobytes())
            index.write(np.arange(lengths.size + 1, dtype=np.int64).tobytes())
            _sync(index)
        counts = {"documents": self.documents, "tokens": self.tokens}
        with part(self.prefix, ".json").open("wb") as sidecar:
            sidecar.write(json.dumps(counts | facts, indent=1).encode() + b"\n")
            _sync(sidecar)

    def __enter__(self) -> TokenStoreWriter:
        return self

    def __exit__(self, fault: type[BaseException] | None, *_: object) -> None:
        if fault is not None:
            self._bin.close()
        elif not self._bin.closed:
            self.close()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


class TokenStore:
    """A store opened for reading. Cheap to open, to pickle and to share between processes.

    Args:
        prefix: path without `.bin`, `.idx`.

    Attributes:
        tokens, documents: how many it holds.
        dtype: of a stored token.
        facts: content of `PREFIX.json`: `digest`, `vocab` and `separator` of the tokenizer, `documents`,
            `tokens`, `utf8_bytes` of the text, `skipped` lines; empty for a store that was written elsewhere.

    Raises:
        DataError: a file is missing, truncated, of another format, or of another store.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        index = _map(part(self.prefix, ".idx"))
        self.dtype, sequences, documents = _read_header(part(self.prefix, ".idx"), index)
        lengths = np.frombuffer(index, np.int32, sequences, HEADER.size)
        self._pointers = np.frombuffer(index, np.int64, sequences, HEADER.size + 4 * sequences)
        self._firsts = np.frombuffer(index, np.int64, documents + 1, HEADER.size + 12 * sequences)
        if self._firsts[0] != 0 or self._firsts[-1] != sequences:
            rule = f"its documents span sequences {self._firsts[0]} to {self._firsts[-1]} of {sequences}"
            raise DataError(f"{part(self.prefix, '.idx')}: not an index: {rule}; build the store again")
        size = int(self._pointers[-1]) + int(lengths[-1]) * self.dtype.itemsize if sequences else 0
        self._bytes = _map_bin(part(self.prefix, ".bin"), size)
        self._stream = np.frombuffer(self._bytes, self.dtype)
        self.tokens, self.documents = self._stream.size, documents
        self._starts = _Starts(self._firsts, self._pointers, self.dtype.itemsize, self.tokens)
        self.facts: dict[str, Any] = _read_facts(part(self.prefix, ".json"), self.tokens, documents)

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return type(self), (self.prefix,)

    def read(self, start: int, count: int) -> npt.NDArray[Any]:
        """Tokens [start, start + count) of the stream, over document borders: a read-only view, no copy.

        Raises:
            IndexError: the range is not within [0, tokens).
        """
        if start < 0 or count < 0 or start + count > self.tokens:
            raise IndexError(f"{self.prefix}: [{start}, {start + count}) is not within {self.tokens} tokens")
        first, last = start * self.dtype.itemsize, (start + count) * self.dtype.itemsize
        if isinstance(self._bytes, mmap.mmap) and last - first > 4 * mmap.PAGESIZE and ADVISED:
            page = first // mmap.PAGESIZE * mmap.PAGESIZE
            self._bytes.madvise(mmap.MADV_WILLNEED, page, last - page)
        return self._stream[start : start + count]

    def boundaries(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Offsets in [start, stop) of the stream at which documents begin, ascending.

        Costs O(log documents + hits).
        """
        low = bisect.bisect_left(self._starts, start)
        high = bisect.bisect_left(self._starts, stop, low)
        firsts = self._firsts[low:high]
        firsts = firsts[: np.searchsorted(firsts, self._pointers.size)]  # empty documents at the very end
        return np.unique(self._pointers[firsts] // self.dtype.itemsize)

    def document(self, i: int) -> npt.NDArray[Any]:
        """Tokens of document i, the separator that ends it included: a read-only view.

        Raises:
            IndexError: there is no such document.
        """
        if not 0 <= i < self.documents:
            raise IndexError(f"{self.prefix}: no document {i}, it holds {self.documents}")
        return self._stream[self._starts[i] : self._starts[i + 1]]

    def text(self, i: int, separator: int) -> npt.NDArray[Any]:
        """Tokens of document i without the separator that ends it: a read-only view."""
        tokens = self.document(i)
        ended = tokens.size and (self.facts.get("separator") == separator or tokens[-1] == separator)
        return tokens[:-1] if ended else tokens

    def text_lengths(self, separator: int) -> npt.NDArray[np.int64]:
        """Sizes of all `text`s: int64 [documents]. Costs O(documents), and reads no token of stores built here.

        Those say in their facts that every document ends with the separator; of others the ends are read.
        """
        offsets = np.append(self._pointers // self.dtype.itemsize, self.tokens)[self._firsts]
        lengths = np.diff(offsets)
        ended = lengths > 0
        if self.facts.get("separator") != separator:
            ended[ended] = self._stream[offsets[1:][ended] - 1] == separator
        return lengths - ended


class _Starts(Sequence[int]):
    """Offset in the stream at which each document begins, looked up when asked for (for `bisect`).

    `np.searchsorted` would copy the whole table, which is not aligned in the file.
    """

    def __init__(self, firsts: npt.NDArray[Any], pointers: npt.NDArray[Any], itemsize: int, end: int) -> None:
        self._firsts, self._pointers, self._itemsize, self._end = firsts, pointers, itemsize, end

    def __len__(self) -> int:
        return self._firsts.size - 1

    def __getitem__(self, i: Any) -> Any:
        first = int(self._firsts[i])
        return self._end if first == self._pointers.size else int(self._pointers[first]) // self._itemsize


def check_tokenizer(store: TokenStore, tokenizer: Tokenizer) -> None:
    """Raise DataError if the store was written with another tokenizer than this one.

    Of a store without a sidecar only the end of its last document is known, so that much is checked.
    """
    digest, vocab = store.facts.get("digest"), store.facts.get("vocab")
    if digest not in (None, tokenizer.digest) or vocab not in (None, tokenizer.vocab):
        rule = (
            f"written with a tokenizer of {vocab} ids (digest {str(digest)[:12]}), and the job's has "
            f"{tokenizer.vocab} (digest {tokenizer.digest[:12]}): set data.tokenizer or build it again"
        )
        raise DataError(f"{store.prefix}: {rule}")
    if store.documents and not store.facts:
        last = store.document(store.documents - 1)
        if last.size and not 0 <= int(last.min()) <= int(last.max()) < tokenizer.vocab:
            rule = f"holds the id {last.max()}, and the job's tokenizer has {tokenizer.vocab} ids"
            raise DataError(f"{store.prefix}: {rule}: set data.tokenizer")


def summary(prefix: str | Path) -> dict[str, Any]:
    """What `headway data inspect` shows of a store: counts, sizes, and the sidecar's facts."""
    store = TokenStore(prefix)
    known: dict[str, Any] = {"documents": store.documents, "tokens": store.tokens, "dtype": store.dtype.name}
    known["bytes_on_disk"] = sum(part(store.prefix, s).stat().st_size for s in (".bin", ".idx"))
    known["tokens_per_document"] = round(store.tokens / max(1, store.documents), 1)
    if store.facts.get("utf8_bytes") and store.tokens:
        known["bytes_per_token"] = round(store.facts["utf8_bytes"] / store.tokens, 3)
    return known | {key: value for key, value in store.facts.items() if key not in known}


def _map(path: Path) -> mmap.mmap | bytes:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return b""  # an empty file cannot be mapped
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise DataError(
            f"{path}: the file does not exist; a token store is a .bin and an .idx file"
        ) from None
    except OSError as fault:
        raise DataError(f"{path}: cannot be opened: {fault}") from fault


def _read_header(path: Path, index: mmap.mmap | bytes) -> tuple[np.dtype[Any], int, int]:
    """Dtype, number of sequences and of documents; the index has the size that they demand."""
    if len(index) < HEADER.size:
        raise DataError(f"{path}: truncated: {len(index)} bytes, its header alone has {HEADER.size}")
    magic, version, code, sequences, entries = HEADER.unpack_from(index)
    if magic != MAGIC or version != 1:
        raise DataError(
            f"{path}: not the index of a token store: it begins with {magic!r}, version {version}"
        )
    if code not in DTYPES:
        known = ", ".join(f"{code} ({dtype})" for code, dtype in DTYPES.items())
        raise DataError(f"{path}: unknown dtype {code} of tokens; known are {known}")
    size = HEADER.size + 12 * sequences + 8 * entries
    if entries < 1 or len(index) not in (size, size + sequences):  # the modes of multimodal stores follow
        rule = f"{len(index)} bytes, but {sequences} sequences and {entries - 1} documents make {size}"
        raise DataError(f"{path}: truncated or damaged: {rule}; build the store again")
    return DTYPES[code], sequences, entries - 1


def _map_bin(path: Path, size: int) -> mmap.mmap | bytes:
    """The mapped tokens, if the file has the size that the index says."""
    tokens = _map(path)
    if len(tokens) < size:
        rule = f"truncated, or not the .bin of this .idx: it has {len(tokens)} bytes, the .idx says {size}"
        raise DataError(f"{path}: {rule}; copy or build the store again")
    if len(tokens) > size:
        raise DataError(
            f"{path}: the .idx belongs to another .bin: it says {size} bytes, there are {len(tokens)}"
        )
    if isinstance(tokens, mmap.mmap) and ADVISED:
        tokens.madvise(mmap.MADV_RANDOM)
    return tokens


def _read_facts(path: Path, tokens: int, documents: int) -> dict[str, Any]:
    """Content of the sidecar, if there is one, and if it is of this store."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        found = facts["tokens"], facts["documents"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as fault:
        raise DataError(
            f"{path}: not the sidecar of a token store: {fault!r}; delete it to do without"
        ) from fault
    if found != (tokens, documents):
        there = f"{tokens} tokens in {documents} documents"
        raise DataError(
            f"{path}: belongs to another store: it says {found[0]} in {found[1]}, there are {there}"
        )
    return facts
