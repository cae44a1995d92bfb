"""Fill-in-the-middle (Bavarian et al. 2022): a document's middle moves to its end.

    PSM   <prefix> prefix <suffix> suffix <middle> middle
    SPM   <prefix> <suffix> suffix <middle> prefix middle      (the paper's joint form, appendix D)

Documents are transformed within their rows ("context-level", section 3.1), at borders of tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from headway.pretrain.data.corruption.noise import Ints, Stream, draws
from headway.pretrain.data.specials import Specials

if TYPE_CHECKING:
    from headway.pretrain import config

ADDED = 3
"""Special tokens that a transformed document gets."""


def fim(
    tokens: Ints, documents: NDArray[np.int32], keys: Ints, settings: config.Infill, specials: Specials
) -> tuple[Ints, NDArray[np.int32]]:
    """Rows in which each document is transformed with chance `rate`, and of these `spm` with the suffix first.

    Both cuts are uniform over the document's len + 1 places, so that each part may be empty. A separator at the
    beginning of a document stays there; documents without any other token stay as they are.

    Rows keep their length. The room for the special tokens is taken from the row's end *before* its last document is
    cut, so that every transformed document is complete in itself: of a row with k transformed documents, the last
    3 k tokens are not trained on in this epoch, and nothing else is lost. A document of which less than one token
    would be left stays as it is.

    Args:
        tokens: int64 [n, L].
        documents: int32 [n, L], see `headway.pretrain.data.stream.document_ids`; all zeros take rows as documents.
        keys: int64 [n].

    Returns:
        tokens int64 [n, L] and documents int32 [n, L], which move with them.
    """
    most = int(documents.max(initial=0)) + 1
    draw = draws(keys, 4 * most, Stream.INFILL).reshape(len(tokens), most, 4)
    names = (specials.ids[f"fim_{part}"] for part in ("prefix", "middle", "suffix"))
    marks = tuple(np.array([i], np.int64) for i in names)
    new_tokens, new_documents = np.empty_like(tokens), np.empty_like(documents)
    for row, (old, ids) in enumerate(zip(tokens, documents, strict=True)):
        place = 0
        for piece in np.split(np.arange(old.size), np.flatnonzero(np.diff(ids)) + 1):
            number = ids[piece[0]]
            part = _transform(old[piece], old.size - place, draw[row, number], settings, specials, marks)
            new_tokens[row, place : place + part.size] = part
            new_documents[row, place : place + part.size] = number
            place += part.size
    return new_tokens, new_documents


def _transform(
    piece: Ints,
    room: int,
    draw: NDArray[np.float64],
    settings: config.Infill,
    specials: Specials,
    marks: tuple[Ints, ...],
) -> Ints:
    """A document, transformed if its first draw says so, in at most `room` tokens."""
    head = int(piece.size > 0 and piece[0] == specials.separator)
    size = min(piece.size - head, room - head - ADDED)
    if draw[0] >= settings.rate or size < 1:
        return piece[:room]
    text = piece[head : head + size]
    low, high = sorted((draw[2:] * (size + 1)).astype(np.int64).tolist())
    prefix, middle, suffix = text[:low], text[low:high], text[high:]
    before, between, after = marks
    if draw[1] < settings.spm:
        order = [before, after, suffix, between, prefix, middle]
    else:
        order = [before, prefix, after, suffix, between, middle]
    return np.concatenate([piece[:head], *order])
