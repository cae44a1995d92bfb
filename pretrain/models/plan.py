"""A model's plan: which dim of which parameter tensor parallelism cuts, said once, as data (Shoeybi et al. 2019).

Columns: a layer's outputs are cut, nothing is sent. Rows: its inputs are cut, outputs are summed. Attention is cut by
heads, feed-forward layers and experts by their width, words by rows of the table. What no pattern names is whole
everywhere.
"""

from __future__ import annotations

import re

CUTS: tuple[tuple[str, int], ...] = (
    (r"(attention|cross)\.[qkv]\.(weight|bias)", 0),
    (r"(attention|cross)\.o\.weight", 1),
    (r"(attention|cross)\.own\.[a-z0-9_]+", 0),
    (r"(attention|cross)\.gates\.[a-z0-9_]+\.(weight|bias)", 0),
    (r"mlp\.(shared\.)?(gate|up)\.(weight|bias)", 0),
    (r"mlp\.(shared\.)?down\.weight", 1),
    (r"mlp\.(gate|up)", 1),  # stacks of experts [X, F, E]
    (r"mlp\.(gate|up)_bias", 1),
    (r"mlp\.down", 2),
    (r"relative\.table\.weight", 1),
    (r"embed\.tokens\.weight", 0),
)
"""Pattern of the end of a canonical name -> the dim that is cut."""

PER_HEAD = (r"(q|k)_norm\.weight",)
"""Whole everywhere, but every rank applies them to its own heads: gradients are sums over ranks."""


WORDS = re.compile(r"(distillation\.)?head\.(weight|extra|bias)")
"""The head's own parameters, and those of a teacher's, of objectives that predict words: rows are cut."""


def cut_of(name: str, words: bool) -> int | None:
    """The dim of a parameter that is cut, None if it is whole everywhere.

    Args:
        name: canonical.
        words: whether the objective predicts words.
    """
    if words and WORDS.fullmatch(name):
        return 0
    return next((dim for pattern, dim in CUTS if re.search(rf"(^|\.){pattern}$", name)), None)


def per_head(name: str) -> bool:
    """Whether a whole parameter has a share of its gradient on every rank."""
    return any(re.search(rf"(^|\.){pattern}$", name) for pattern in PER_HEAD)
