"""Training of lossless SentencePiece models whose pieces may hold spaces, tabs and newlines.

Bytes a token on held-out files of the Python library at 4,096 pieces: BPE within words 3.7, over
words within a line 4.2; a unigram model within words 3.5, in ten times the time.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from headway.pretrain.data.tokenizer import SEPARATOR, SentencePieceTokenizer, split_lines
from headway.pretrain.errors import DataError, JobError

# SentencePiece's trainer strips newlines, reserves tab, NUL and U+2585, and writes a space as U+2581. While
# it trains, private characters stand in for these (a finished model never sees them), or they are left out.
STAND_INS = {"\n": "\ue00a", "\t": "\ue009", "\r": "\ue00d", "\0": "", "\u2581": "", "\u2585": ""}
CHARACTERS_OF_A_LINE = 4000
"""Longer lines are cut for training: the trainer's cost grows faster than a line."""


SETTINGS: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    # Text is taken as it is: these four make the model lossless.
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    # Pieces may mix letters, digits and signs, and hold a deep indentation.
    "split_by_unicode_script": False,
    "split_by_number": False,
    "max_sentencepiece_length": 32,
    "max_sentence_length": 8 * CHARACTERS_OF_A_LINE,
    "unk_id": 0,
    "eos_id": 1,
    "eos_piece": SEPARATOR,
    "bos_id": -1,
    "pad_id": -1,
    "minloglevel": 2,
}


def train_sentencepiece(
    texts: Iterable[str], vocab: int, out_path: Path, span: Literal["line", "word"] = "line"
) -> SentencePieceTokenizer:
    """Train a lossless BPE model, write it and return it. Equal texts give equal files.

    Args:
        texts: the documents; they are held in memory.
        vocab: pieces, among them 256 bytes, `<unk>` (never used) and the separator.
        out_path: the `.model` file.
        span: how far a piece may reach: over words within a line (fewest tokens), or one word with the
            spaces before it.

    Raises:
        DataError: there is no text.
        JobError: the text has too few pieces for `vocab`, or too many characters.
    """
    from sentencepiece import SentencePieceTrainer

    class Model:
        content = b""

        def write(self, content: bytes) -> None:
            self.content = content

    lines = training_lines(texts)
    if (first := next(lines, None)) is None:
        raise DataError("no text to train a tokenizer on: all documents are empty, or kept out of training")
    model = Model()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], lines),
            model_writer=model,
            vocab_size=vocab,
            split_by_whitespace=span == "word",
            **SETTINGS,
        )
    except RuntimeError as fault:
        raise _vocabulary_fault(vocab, str(fault)) from fault
    content = whitespace_as_it_is(model.content)
    tokenizer = SentencePieceTokenizer(content)
    if tokenizer.vocab != vocab:
        rule = "the text has too few different pieces for so large a vocabulary"
        raise JobError("data.tokenizer.vocab", vocab, rule, tokenizer.vocab)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    out_path.write_bytes(content)
    return tokenizer


def training_lines(texts: Iterable[str]) -> Iterator[str]:
    """The lines of the texts, each with the newlines that end it, with stand-ins, none of them too long."""
    table = str.maketrans(STAND_INS)
    for text in texts:
        for line in split_lines(text):
            for start in range(0, len(line), CHARACTERS_OF_A_LINE):
                if part := line[start : start + CHARACTERS_OF_A_LINE].translate(table):
                    yield part


def whitespace_as_it_is(model: bytes) -> bytes:
    """The model with real whitespace in its pieces in place of stand-ins and U+2581.

    With `escape_whitespaces` off, SentencePiece then takes text as it is; and as no piece holds U+2581, one
    in a text becomes bytes instead of being taken for a space. Any SentencePiece library can use the result.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    proto = ModelProto.FromString(model)
    table = str.maketrans(
        {stand_in: real for real, stand_in in STAND_INS.items() if stand_in} | {"\u2581": " "}
    )
    for piece in proto.pieces:
        if piece.type == piece.NORMAL:
            piece.piece = piece.piece.translate(table)
    proto.normalizer_spec.escape_whitespaces = False
    return proto.SerializeToString(deterministic=True)


def _vocabulary_fault(vocab: int, message: str) -> Exception:
    """The trainer's refusal of a vocabulary's size in the job's words."""
    if found := re.search(r"smaller than required_chars\. *\d+ vs (\d+)", message):
        return JobError(
            "data.tokenizer.vocab", vocab, "must hold 256 bytes and the text's characters", int(found[1])
        )
    if found := re.search(r"value <= (\d+)", message):
        return JobError("data.tokenizer.vocab", vocab, "the text has too few pieces for it", int(found[1]))
    return DataError(f"SentencePiece could not be trained: {message}")
