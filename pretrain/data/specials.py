"""Special tokens: which an objective needs, and their ids.

A tokenizer's own tokens are taken where its file has them. Others get ids after the tokenizer's vocabulary, so that
the stores, and what their ids mean, stay as they are; only the embedding table grows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from headway.pretrain.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from headway.pretrain import config

NAMES = {
    "cls": ("[CLS]", "<cls>", "<s>"),
    "sep": ("[SEP]", "<sep>", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "pad": ("[PAD]", "<pad>"),
    "mode_R": ("[NLU]",),
    "mode_S": ("[S2S]",),
    "mode_X": ("[NLG]",),
    "fim_prefix": ("<fim_prefix>", "<|fim_prefix|>", "<fim-prefix>"),
    "fim_middle": ("<fim_middle>", "<|fim_middle|>", "<fim-middle>"),
    "fim_suffix": ("<fim_suffix>", "<|fim_suffix|>", "<fim-suffix>"),
}
"""Under which names the files of tokenizers have them (BERT, RoBERTa, T5, UL2, StarCoder, Qwen), in this order."""

NEEDED = {
    "causal": (),
    "masked": ("cls", "sep", "mask", "pad"),
    "spans": ("pad",),
    "ul2": ("pad", "mode_R", "mode_S", "mode_X"),
    "prefix": ("pad",),
    "pairs": ("pad",),
    "classify": (),
    "mae": (),
}


@dataclass(frozen=True)
class Specials:
    """Ids of special tokens.

    Attributes:
        vocab: rows of the embedding table: what the tokenizer has, and what was added to it.
        separator: ends documents, and rows of encoder-decoders (EOS).
        text: ids of the tokenizer are in [0, text).
        ids: of `cls`, `sep`, `mask`, `pad`, `bos` (what a decoder starts from: `pad`, as in T5), `mode_R`, `mode_S`,
            `mode_X`, `fim_prefix`, `fim_middle` and `fim_suffix`, those that the objective needs.
        sentinels: id of each; new ones count down from the end of the vocabulary, as in T5.
    """

    vocab: int
    separator: int
    text: int
    ids: dict[str, int] = field(default_factory=dict)
    sentinels: list[int] = field(default_factory=list)

    @cached_property
    def ordinary(self) -> NDArray[np.int64]:
        """Ids of the tokenizer that are none of these, ascending."""
        taken = [self.separator, *self.ids.values(), *self.sentinels]
        return np.setdiff1d(np.arange(self.text, dtype=np.int64), taken)


def assign(tokenizer: Tokenizer, objective: config.Objective) -> Specials:
    """Special tokens for an objective.

    New ids follow the tokenizer's: first the tokens by name, in the order of `NEEDED`, then sentinels, the last
    ones first. So sentinel 0 is the last row of the table, and T5's tokenizer gets the ids of T5's tables.
    """
    needed = list(NEEDED[objective.name])
    if objective.name == "causal" and objective.infill.rate > 0:
        needed += ["fim_prefix", "fim_middle", "fim_suffix"]
    count = objective.spans.sentinels if objective.name in ("spans", "ul2") else 0
    known = {role: found for role in needed if (found := _find(tokenizer, NAMES[role])) is not None}
    vocab = tokenizer.vocab
    for role in needed:
        if role not in known:
            known[role] = vocab
            vocab += 1
    sentinels = [_find(tokenizer, (f"<extra_id_{k}>",)) for k in range(count)]
    for k in reversed(range(count)):
        if sentinels[k] is None:
            sentinels[k] = vocab
            vocab += 1
    ids = {role: known[role] for role in needed}
    if objective.name in ("spans", "ul2", "prefix", "pairs"):
        ids["bos"] = ids["pad"]
    return Specials(vocab, tokenizer.separator, tokenizer.vocab, ids, [s for s in sentinels if s is not None])


def _find(tokenizer: Tokenizer, names: tuple[str, ...]) -> int | None:
    return next((found for name in names if (found := tokenizer.find(name)) is not None), None)


def word_starts(tokenizer: Tokenizer, specials: Specials) -> NDArray[np.bool_]:
    """Which ids begin a word, for whole-word masking: bool [specials.vocab].

    - SentencePiece and byte-level BPE mark the space before a word: pieces with whitespace in them begin one. What
      follows without a space, signs included, belongs to the word before.
    - WordPiece marks the rest of a word: pieces without "##" begin one.
    - Of bytes and single characters all begin a word that are not letters or digits (bytes from 128 on are parts of
      letters): a space and the letters after it are a word.
    - Otherwise every token is a word. Tokens that are not text begin one each.
    """
    pieces = tokenizer.pieces()
    if max(map(len, pieces)) <= 1:
        starts = [not (piece.isalnum() or piece > "\x7f") for piece in pieces]
    elif any(len(piece) > 1 and _has_space(piece) for piece in pieces):
        starts = [_has_space(piece) or not piece for piece in pieces]
    else:
        starts = [not piece.startswith("##") for piece in pieces]
    return np.array(starts + [True] * (specials.vocab - len(starts)))


def _has_space(piece: str) -> bool:
    return any(c in piece for c in " \n\t\r")
