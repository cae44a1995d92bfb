"""Pairs of texts for sequence-to-sequence training: a source for the encoder, a target for the decoder.

Shapes: `n` pairs, `S` tokens in a row of sources, `T` in a row of targets.
"""

from __future__ import annotations

import numpy as np

from headway.pretrain.data.samples import Ints, Rows
from headway.pretrain.data.segments import Documents
from headway.pretrain.data.token_rows import outside_error
from headway.pretrain.errors import DataError

NAMED = 20
"""Pairs too long for their rows that are named one by one; all are counted."""


class TextPairs:
    """Documents of two aligned stores, each row one of them and the end-of-text token; a `Samples`.

    A pair is never cut: one that is longer than a row on either side is left out and counted.

    Args:
        sources, targets: stores; document i of one belongs to document i of the other.
        seq_len: S.
        target_len: T.
        separator: token that ends each document of the stores, and each text of a row.
        pad: fills up the rows.
        name: of the source, in errors.
        vocab: tokens must be below it; None leaves them unchecked.

    Attributes:
        left_out: pairs that are too long.
        left_out_first: the first of them, `NAME pair NUMBER: sizes`.

    Raises:
        DataError: the stores hold different numbers of documents, or no pair that fits.
    """

    def __init__(
        self,
        sources: Documents,
        targets: Documents,
        seq_len: int,
        target_len: int,
        separator: int,
        pad: int,
        name: str,
        vocab: int | None = None,
    ) -> None:
        if sources.documents != targets.documents:
            rule = f"holds {sources.documents} sources and {targets.documents} targets, which are not pairs"
            raise DataError(f"{name}: {rule}; build both stores again")
        self.sources, self.targets = sources, targets
        self.seq_len, self.target_len = seq_len, target_len
        self.separator, self.pad, self.name, self.vocab = separator, pad, name, vocab
        lengths = [store.text_lengths(separator) + 1 for store in (sources, targets)]
        fits = (lengths[0] <= seq_len) & (lengths[1] <= target_len)
        self._pairs = np.flatnonzero(fits)
        self.left_out = int(fits.size - self._pairs.size)
        self.left_out_first = [
            f"{name} pair {i}: {lengths[0][i]} and {lengths[1][i]} tokens, of at most {seq_len} and {target_len}"
            for i in np.flatnonzero(~fits)[:NAMED].tolist()
        ]
        if not self._pairs.size:
            rule = f"no pair that fits data.seq_len = {seq_len} and data.target_len = {target_len}"
            shortest = (
                f", the shortest sides have {lengths[0].min()} and {lengths[1].min()} tokens"
                if fits.size
                else ""
            )
            raise DataError(
                f"{name}: {rule}: of {fits.size} pairs{shortest}; set longer rows or give more text"
            )
        self.identity: dict[str, int | str] = {
            "tokens": sources.tokens,
            "target_tokens": targets.tokens,
            "seq_len": seq_len,
            "target_len": target_len,
        }

    def __len__(self) -> int:
        """Number of pairs that fit."""
        return self._pairs.size

    def rows(self, indices: Ints, keys: Ints) -> Rows:
        """Pairs of these numbers; nothing in them is random.

        Returns:
            `inputs` int64 [n, S], `targets` int64 [n, T]: tokens, the separator, padding.
            `input_lengths`, `target_lengths` int64 [n]: tokens before the padding.

        Raises:
            DataError: a token outside the vocabulary; names source, document and offset in it.
        """
        pairs = self._pairs[indices]
        inputs, input_lengths = self._side("source", self.sources, pairs, self.seq_len)
        targets, target_lengths = self._side("target", self.targets, pairs, self.target_len)
        lengths = {"input_lengths": input_lengths, "target_lengths": target_lengths}
        return {"inputs": inputs, "targets": targets, **lengths}

    def _side(self, side: str, store: Documents, pairs: Ints, width: int) -> tuple[Ints, Ints]:
        """Rows of one side, int64 [n, width], and the tokens in each, int64 [n]."""
        rows = np.full((pairs.size, width), self.pad, np.int64)
        lengths = np.empty(pairs.size, np.int64)
        for i, pair in enumerate(pairs.tolist()):
            text = store.text(pair, self.separator).astype(np.int64)
            if error := outside_error(f"{self.name}, {side} of pair {pair}", 0, text, self.vocab):
                raise error
            rows[i, : text.size] = text
            rows[i, text.size] = self.separator
            lengths[i] = text.size + 1
        return rows, lengths
