"""What is read, and in which shape."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from headway.pretrain.config.base import AboveZero, Count, Fraction, Positive, Section, as_tuple


class Tokenizer(Section):
    """How text becomes tokens. Without a path, a SentencePiece model is trained on the sources."""

    kind: Literal["sentencepiece", "huggingface", "bytes"] = "sentencepiece"
    path: str | None = None
    """A `.model` (sentencepiece) or `tokenizer.json` (huggingface)."""
    vocab: Annotated[int, Field(ge=260)] = 32768
    """Pieces of a tokenizer that is trained here."""
    span: Literal["line", "word"] = "line"
    """How far its pieces reach: over words within a line (fewest tokens), or one word with spaces before it."""
    train_bytes: Positive = 30_000_000
    """At most this many bytes of the corpus are shown to the trainer, which takes 65 bytes of memory for each."""


class Source(Section):
    """Where samples come from.

    Text: a path or glob of text, JSONL or Parquet files (each also `.gz` or `.zst`), a folder of files, a token
    store (the path without `.bin`/`.idx`), or `stdlib:`, the sources of the running Python's library. Images: a
    folder that holds a folder per class, WebDataset `.tar` shards, Parquet files, a `.npz` of arrays `images`
    and `labels`, or `sklearn:digits`.
    """

    path: str
    weight: AboveZero = 1.0
    """Share of the blend, relative to the other sources."""
    column: str = "text"
    """Field of a JSONL object or column of a Parquet table that holds the text."""
    target: str | None = None
    """Field or column that holds the target, for pairs of texts."""


class Images(Section):
    """Images, for the family vit."""

    size: Positive = 224
    """Side of the square that the model sees, in pixels."""
    channels: Literal[1, 3] = 3
    mean: Annotated[tuple[float, ...], BeforeValidator(as_tuple)] = (0.5,)
    """Of pixels in [0, 1]; one value for all channels, or one each."""
    std: Annotated[tuple[AboveZero, ...], BeforeValidator(as_tuple)] = (0.5,)
    column: str = "image"
    """Column of a Parquet table that holds the encoded image."""
    label: str = "label"
    """Column of a Parquet table, or extension within a WebDataset shard, that holds the class."""


def _source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class Data(Section):
    """What is read, and in which shape."""

    sources: Annotated[
        list[Annotated[Source, BeforeValidator(_source)]],
        BeforeValidator(lambda v: [v] if isinstance(v, str) else v),
        Field(min_length=1),
    ] = [Source(path="stdlib:")]
    seq_len: Positive = 1024
    """Tokens that the model reads in a row; of an encoder-decoder, tokens of the encoder."""
    target_len: Positive | None = None
    """Tokens of the decoder's row; derived from the objective if not given."""
    tokenizer: Tokenizer = Tokenizer()
    heldout: Fraction = 0.05
    """Share of documents (images) kept out of training, chosen by a hash of their path (files) or place (rows)."""
    documents: Literal["attend", "isolate"] = "attend"
    """Whether a token sees earlier documents of its packed row."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a malformed line or image does; skipped ones are counted and reported."""
    cache: str | None = None
    """Folder of built tokenizers and stores; $HEADWAY_CACHE or ~/.cache/headway if not given."""
    workers: Count = 0
    """Processes that build a store; 0 takes all cores."""
    images: Images = Images()
