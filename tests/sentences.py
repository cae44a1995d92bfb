"""How far a student orders pairs of sentences as its teacher does: the rank correlation of their cosines.

Sentences are those of docstrings of library files that training has not read. A sentence's embedding is the mean of its
last hidden states, as sentence-transformers pools them (all-MiniLM-L6-v2: 1_Pooling/config.json). Half of the pairs
follow one another in a docstring, half are drawn from all.

Shapes: N sentences, P pairs, B batch, S sequence, E hidden size.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from headway.launch.assemble import Parts
from headway.launch.run import restored
from headway.pretrain.data.corpus import stdlib_sources
from headway.pretrain.data.workers import is_heldout

WORDS = 6, 40
"""Shortest and longest sentence."""
PAIRS = 1000
"""Of either kind, at most."""
ROWS = 64


class Agreement(NamedTuple):
    """Of cosines by two models, over pairs of sentences.

    Attributes:
        spearman: correlation of ranks.
        pearson: of values.
        pairs: how many.
    """

    spearman: float
    pearson: float
    pairs: int


def agreement(student: str, teacher: str) -> Agreement:
    """Of the models of two runs: of the first itself, of the second its teacher."""
    with ExitStack() as stack:
        taught = restored(teacher, ["objective.distill.precision=fp32"], stack)
        assert taught.engine.teacher is not None
        sentences, pairs_P2 = heldout_pairs(taught.job.data.heldout)
        ours = taught if student == teacher else None
        theirs = cosines(taught, taught.engine.teacher.teaching.objective, sentences, pairs_P2)
        if ours is not None:
            found = cosines(ours, ours.engine.objective, sentences, pairs_P2)
    if ours is None:
        with ExitStack() as stack:
            ours = restored(student, [], stack)
            found = cosines(ours, ours.engine.objective, sentences, pairs_P2)
    ranks = correlation(*(np.argsort(np.argsort(x)).astype(float) for x in (found, theirs)))
    return Agreement(ranks, correlation(found, theirs), len(pairs_P2))


def correlation(a_P: np.ndarray, b_P: np.ndarray) -> float:
    return float(np.corrcoef(a_P, b_P)[0, 1])


def heldout_pairs(heldout: float) -> tuple[list[str], np.ndarray]:
    """Sentences, and pairs of their numbers [P, 2]; the same in every process."""
    texts = [
        list(split(text))
        for path, name in stdlib_sources()
        if is_heldout(name, heldout)
        for text in docstrings(path.read_text(encoding="utf-8", errors="replace"))
    ]
    sentences = list(dict.fromkeys(sentence for text in texts for sentence in text))
    number = {sentence: i for i, sentence in enumerate(sentences)}
    following = [(number[a], number[b]) for text in texts for a, b in pairwise(text) if a != b]
    rng = np.random.default_rng(0)
    following_P2 = rng.permutation(np.array(following))[:PAIRS]
    drawn_P2 = rng.integers(len(sentences), size=(len(following_P2), 2))
    return sentences, np.concatenate((following_P2, drawn_P2[drawn_P2[:, 0] != drawn_P2[:, 1]]))


def docstrings(source: str) -> Iterator[str]:
    """Of a module, its classes and functions."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def split(text: str) -> Iterator[str]:
    """Sentences of a text that are neither too short nor too long, on one line each."""
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
            if WORDS[0] <= len(sentence.split()) <= WORDS[1]:
                yield sentence


@torch.no_grad()
def cosines(
    parts: Parts, objective: torch.nn.Module, sentences: list[str], pairs_P2: np.ndarray
) -> np.ndarray:
    """Of the embeddings of each pair, by a model that reads the words of `parts`: [P]."""
    e_NE = torch.cat(list(embeddings(parts, objective, sentences)))
    a_PE, b_PE = (e_NE[torch.from_numpy(pairs_P2[:, side])] for side in (0, 1))
    return F.cosine_similarity(a_PE, b_PE).double().numpy()


def embeddings(parts: Parts, objective: torch.nn.Module, sentences: list[str]) -> Iterator[Tensor]:
    """Means of last hidden states over the places of each sentence, special ones with them: [B, E] at a time."""
    tokenizer, specials = parts.dataset.tokenizer, parts.dataset.specials
    assert tokenizer is not None
    assert specials is not None
    first, last, length = specials.ids["cls"], specials.ids["sep"], parts.job.data.seq_len
    rows = [[first, *ids[: length - 2].tolist(), last] for ids in tokenizer.encode_batch(sentences)]
    objective.eval()
    for i in range(0, len(rows), ROWS):
        chunk = [torch.tensor(row) for row in rows[i : i + ROWS]]
        pad = torch.nn.utils.rnn.pad_sequence
        tokens_BS = pad(chunk, batch_first=True, padding_value=specials.ids["pad"])
        documents_BS = pad([torch.zeros_like(row) for row in chunk], batch_first=True, padding_value=-1)
        x_BSE = objective.model(tokens_BS, documents_BS).final.float()
        real_BS1 = (documents_BS >= 0)[..., None]
        yield torch.where(real_BS1, x_BSE, 0).sum(1) / real_BS1.sum(1)
