"""Tokenizers: text to integers and back. SentencePiece, Hugging Face `tokenizer.json`, and plain bytes.

A tokenizer trained here (`tokenizer_training.py`) is BPE with bytes to fall back on, in the SentencePiece
format, and lossless: `decode(encode(text)) == text` for every text that has a UTF-8 form. Its pieces may hold
spaces, tabs and newlines, which makes source code short, and none reaches over the end of a line, so lines
are encoded independently of each other.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from headway.pretrain.errors import DataError, JobError

if TYPE_CHECKING:  # workers import this module, and pydantic would double their start-up time
    from headway.pretrain import config

Ids = npt.NDArray[np.int32]

SEPARATOR = "<|endoftext|>"
SEPARATORS = (SEPARATOR, "<|end_of_text|>", "</s>", "<eos>", "<eod>", "[SEP]")
"""Names under which foreign tokenizers keep their end-of-document token, in order of preference."""

split_lines = re.compile(r"[^\n]*\n+|[^\n]+").findall
"""Cuts text after every run of newlines; joining the parts gives the text back."""


class Tokenizer(Protocol):
    """Text to ids and back; a plain object that can be pickled.

    Attributes:
        vocab: ids are in [0, vocab).
        separator: id of the token that ends a document; `encode` never returns it.
        digest: hexadecimal SHA-256 of the content; equal digests mean equal tokenizers.
    """

    vocab: int
    separator: int
    digest: str

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The same ids as `encode`, one int32 array a text, faster."""
        ...

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        """Text of the ids; byte sequences that are not UTF-8 become U+FFFD, separators vanish."""
        ...

    def find(self, name: str) -> int | None:
        """Id of the special token of this name; None if there is none. Pieces of text are not special tokens."""
        ...

    def pieces(self) -> list[str]:
        """How each id is spelled, with whitespace as it is in texts; "" of ids that stand for no text."""
        ...


class BytesTokenizer:
    """UTF-8 bytes as ids 0-255; 256 is the separator, 257-259 are unused (an embedding of 4 x 65 rows)."""

    vocab = 260
    separator = 256
    digest = hashlib.sha256(b"headway bytes 260").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        return bytes(i for i in map(int, ids) if i < 256).decode(errors="replace")

    def find(self, name: str) -> int | None:
        return None

    def pieces(self) -> list[str]:
        """A byte from 128 on is spelled as the character of that number, whatever character it is a part of."""
        return [chr(i) for i in range(256)] + [""] * (self.vocab - 256)


class SentencePieceTokenizer:
    """A SentencePiece model, trained here or elsewhere.

    Args:
        model: content of a `.model` file.

    Raises:
        DataError: the content is no model, or it has no end-of-document token.
    """

    remembered_lines = 1 << 18
    remembered_bytes = 1 << 24
    """Bounds of the memory of encoded lines, and of their ids: source code repeats every third line."""

    def __init__(self, model: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._sp = SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError, OSError) as fault:
            raise DataError(f"not a SentencePiece model: {fault}") from fault
        self._model = model
        self.vocab: int = self._sp.vocab_size()
        self.separator = self._find_separator()
        self.digest = hashlib.sha256(model).hexdigest()
        self._by_line = self._lines_are_independent()
        self._lines: dict[str, bytes] = {}
        self._bytes = 0

    def __reduce__(self) -> tuple[type, tuple[bytes]]:
        return type(self), (self._model,)

    def encode(self, text: str) -> list[int]:
        return self._sp.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        if not self._by_line:
            return [np.array(ids, np.int32) for ids in self._sp.encode(list(texts), num_threads=1)]
        cut = [split_lines(text) for text in texts]
        if len(self._lines) > self.remembered_lines or self._bytes > self.remembered_bytes:
            self._lines.clear()
            self._bytes = 0
        new = list({line for lines in cut for line in lines if line not in self._lines})
        for line, ids in zip(new, self._sp.encode(new, num_threads=1), strict=True):
            self._lines[line] = packed = array("i", ids).tobytes()
            self._bytes += len(packed)
        return [np.frombuffer(b"".join(map(self._lines.__getitem__, lines)), np.int32) for lines in cut]

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        return self._sp.decode(list(map(int, ids)))

    def find(self, name: str) -> int | None:
        return self._special.get(name)

    def pieces(self) -> list[str]:
        special = set(self._special.values())
        return ["" if i in special else self._spell(i) for i in range(self.vocab)]

    def _spell(self, i: int) -> str:
        piece = self._sp.id_to_piece(i)
        return chr(int(piece[3:5], 16)) if self._sp.is_byte(i) else piece.replace("\u2581", " ")

    @cached_property
    def _special(self) -> dict[str, int]:
        """Names and ids of control symbols and of what the user defined: the processor does not tell them apart."""
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

        pieces = ModelProto.FromString(self._model).pieces
        kinds = (ModelProto.SentencePiece.CONTROL, ModelProto.SentencePiece.USER_DEFINED)
        return {p.piece: i for i, p in enumerate(pieces) if p.type in kinds}

    def _find_separator(self) -> int:
        if self._sp.eos_id() >= 0:
            return self._sp.eos_id()
        for name in SEPARATORS:
            if not self._sp.is_unknown(found := self._sp.piece_to_id(name)):
                return found
        raise DataError(
            f"the SentencePiece model has no end-of-document token: none of eos, {', '.join(SEPARATORS)}"
        )

    def _lines_are_independent(self) -> bool:
        """Whether encoding line by line gives the same ids as encoding the whole.

        True of BPE and unigram models that leave text as it is and have no piece with a character after a
        newline: no merge, and no step of the Viterbi path, can then reach over the end of a line.
        """
        probe = "  a \n\n b\t\r\n\u2581 ﬁ①é\u00a0 "
        pieces = map(self._sp.id_to_piece, range(self.vocab))
        return self._sp.normalize(probe) == probe and not any(
            re.search(r"\n[^\n]", piece) for piece in pieces
        )


class HuggingFaceTokenizer:
    """A `tokenizer.json` of the `tokenizers` library.

    Special tokens that are spelled out in a document are encoded as ordinary text.

    Args:
        content: text of the file.
        separator: name of the end-of-document token; the first of `SEPARATORS` that exists if not given.

    Raises:
        DataError: the content is no tokenizer, or it has no end-of-document token.
    """

    def __init__(self, content: str, separator: str | None = None) -> None:
        from tokenizers import Tokenizer as Library

        try:
            self._library = Library.from_str(content)
        except Exception as fault:  # the library raises bare Exception
            raise DataError(f"not a tokenizer of the tokenizers library: {fault}") from fault
        self._arguments = content, separator
        self._library.no_truncation()
        self._library.no_padding()
        self._library.encode_special_tokens = True
        ids = self._library.get_vocab(with_added_tokens=True)
        names = SEPARATORS if separator is None else (separator,)
        if not (known := [name for name in names if name in ids]):
            raise DataError(f"the tokenizer has no end-of-document token: none of {', '.join(names)}")
        self.separator: int = ids[known[0]]
        self.vocab: int = max(ids.values()) + 1
        self.digest = hashlib.sha256(f"{known[0]}\n{content}".encode()).hexdigest()

    def __reduce__(self) -> tuple[type, tuple[str, str | None]]:
        return type(self), self._arguments

    def encode(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        encoded = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(each.ids, np.int32) for each in encoded]

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        kept = [i for i in map(int, ids) if i != self.separator]
        return self._library.decode(kept, skip_special_tokens=False)

    def find(self, name: str) -> int | None:
        return self._special.get(name)

    def pieces(self) -> list[str]:
        special = set(self._special.values())
        names = [None if i in special else self._library.id_to_token(i) for i in range(self.vocab)]
        # Byte-level BPE writes bytes as printable characters; elsewhere these are letters like any other.
        signs = {"Ġ": " ", "Ċ": "\n", "ĉ": "\t", "č": "\r"} if '"ByteLevel"' in self._arguments[0] else {}
        table = str.maketrans({"\u2581": " "} | signs)
        return [(name or "").translate(table) for name in names]

    @property
    def _special(self) -> dict[str, int]:
        return {token.content: i for i, token in self._library.get_added_tokens_decoder().items()}


def load_tokenizer(config: config.Tokenizer, path: Path | None = None) -> Tokenizer:
    """The tokenizer that the settings name.

    Args:
        config: `data.tokenizer` of a job.
        path: the file to read instead of `config.path` (a tokenizer that was trained for the job).

    Raises:
        JobError: a file is needed and none is named.
        DataError: the file is missing or unreadable, or holds another kind of tokenizer.
    """
    if config.kind == "bytes":
        return BytesTokenizer()
    if path is None and config.path is None:
        rule = f"a tokenizer of kind {config.kind} is read from a file, and none is named"
        raise JobError("data.tokenizer.path", None, rule)
    path = path or Path(config.path or "").expanduser()
    try:
        if config.kind == "sentencepiece":
            return SentencePieceTokenizer(path.read_bytes())
        return HuggingFaceTokenizer(path.read_text(encoding="utf-8"), _named_separator(path))
    except FileNotFoundError:
        raise DataError(f"{path}: the tokenizer's file does not exist (data.tokenizer.path)") from None
    except (OSError, UnicodeDecodeError, DataError) as fault:
        raise DataError(f"{path}: {fault} (data.tokenizer.kind is {config.kind})") from fault


def _named_separator(path: Path) -> str | None:
    """`eos_token` of the `tokenizer_config.json` that Hugging Face keeps beside the tokenizer, if any."""
    settings = path.with_name("tokenizer_config.json")
    if not settings.exists():
        return None
    token = json.loads(settings.read_text(encoding="utf-8")).get("eos_token")
    return token.get("content") if isinstance(token, dict) else token
