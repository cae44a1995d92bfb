"""Masked language modelling: which tokens are predicted, and what is shown in their place.

Shapes: `n` rows, `S` tokens in a row.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from headway.kernels.cross_entropy import IGNORE
from headway.pretrain.data.corruption.noise import Bools, Ints, Stream, draws
from headway.pretrain.data.specials import Specials
from headway.pretrain.errors import JobError

if TYPE_CHECKING:
    from headway.pretrain import config


def mask_tokens(
    tokens: Ints,
    keys: Ints,
    settings: config.Masking,
    specials: Specials,
    maskable: Bools,
    starts: Bools | None = None,
) -> tuple[Ints, Ints]:
    """Inputs and labels of masked language modelling.

    A row's budget is round(rate x maskable tokens), at least 1 if there are any. By `settings.unit`:

    - `token`: exactly that many tokens, all sets of them equally likely (Devlin et al. 2019).
    - `word`: whole words in random order; one that would exceed the budget is passed over (BERT's reference code,
      `do_whole_word_mask`). If all words would, a part of the first one is taken.
    - `span`: spans that begin at random words, with lengths in words from a geometric distribution that is cut off at
      `span_max` and whose mean is `span_mean` (Joshi et al. 2020, section 3.1: p = 0.2, at most 10, mean 3.8). A span
      ends early where it meets another, a token that is not maskable or the budget. Without `starts`, words are
      tokens, and the budget is met exactly; with them, words stay whole.

    Of what is predicted, `mask` is shown as [MASK], `random` as a random ordinary token, the rest as it is. This is
    drawn for each token, and for `span` once for each span, as that paper does.

    Args:
        tokens: int64 [n, S].
        keys: int64 [n].
        maskable: bool [n, S]; false for special tokens and padding.
        starts: bool [n, S], tokens that begin a word (`word_starts(...)[tokens]`); a maskable token after one that
            is not does too.

    Returns:
        inputs int64 [n, S]; labels int64 [n, S], IGNORE where nothing is predicted.

    Raises:
        JobError: shares exceed 1, or no distribution has the asked mean length.
        ValueError: whole words are asked for, and `starts` is not given.
    """
    if settings.mask + settings.random > 1:
        rule = f"with objective.masking.mask = {settings.mask}, must not exceed 1"
        raise JobError("objective.masking.random", settings.random, rule, 1 - settings.mask)
    count = maskable.sum(1)
    budgets = np.where(count > 0, np.maximum(np.rint(settings.rate * count), 1), 0).astype(np.int64)
    first = None
    if settings.unit == "token":
        chosen = _choose_tokens(keys, maskable, budgets)
    elif settings.unit == "word":
        if starts is None:
            raise ValueError("objective.masking.unit = word needs the tokens that begin words (starts)")
        chosen = _choose_words(keys, maskable, starts, budgets)
    else:
        words = np.ones_like(maskable) if starts is None else starts
        chosen, first = _choose_spans(keys, maskable, words, budgets, settings)
    return _show(tokens, keys, settings, specials, chosen, first), np.where(chosen, tokens, IGNORE)


def _show(
    tokens: Ints, keys: Ints, settings: config.Masking, specials: Specials, chosen: Bools, first: Ints | None
) -> Ints:
    """Tokens with masks and random tokens at chosen places, int64 [n, S].

    The k-th chosen token of a row has the k-th pair of numbers: what is shown, which random token. With `first`,
    the first number is that of the place where the token's span begins.
    """
    row, column = np.nonzero(chosen)
    rank = np.cumsum(chosen, 1) - 1
    most = int(rank.max(initial=0)) + 1
    pairs = draws(keys, 2 * most, Stream.MASK_SHOWN).reshape(len(tokens), most, 2)
    decides = column if first is None else first[row, column]
    draw, which = pairs[row, rank[row, decides], 0], pairs[row, rank[row, column], 1]
    random = specials.ordinary[(which * specials.ordinary.size).astype(np.int64)]
    inputs = tokens.copy()
    kept = np.where(draw < settings.mask + settings.random, random, tokens[row, column])
    inputs[row, column] = np.where(draw < settings.mask, specials.ids["mask"], kept)
    return inputs


def _choose_tokens(keys: Ints, maskable: Bools, budgets: Ints) -> Bools:
    """`budgets` of the maskable tokens of each row: those whose draws are least."""
    draw = np.where(maskable, draws(keys, maskable.shape[1], Stream.MASK_ORDER), 2.0)
    order = np.argsort(draw, axis=1, kind="stable")
    chosen = np.empty_like(maskable)
    np.put_along_axis(chosen, order, np.arange(maskable.shape[1]) < budgets[:, None], 1)
    return chosen


def _words(maskable: Bools, starts: Bools) -> tuple[Ints, Ints]:
    """Where the words of one row [S] begin and end (after their last token)."""
    before = np.concatenate([[False], maskable[:-1]])
    begins = np.flatnonzero(maskable & (starts | ~before))
    last = maskable & np.concatenate([starts[1:] | ~maskable[1:], [True]])
    return begins, np.flatnonzero(last) + 1


def _choose_words(keys: Ints, maskable: Bools, starts: Bools, budgets: Ints) -> Bools:
    order = draws(keys, maskable.shape[1], Stream.MASK_ORDER)
    chosen = np.zeros_like(maskable)
    for row, budget in enumerate(budgets.tolist()):
        begins, ends = _words(maskable[row], starts[row])
        ranked = np.argsort(order[row, begins], kind="stable")
        left = budget
        for begin, end in zip(begins[ranked].tolist(), ends[ranked].tolist(), strict=True):
            if end - begin <= left:
                chosen[row, begin:end] = True
                left -= end - begin
                if not left:
                    break
        if left == budget and budget:
            begin = int(begins[ranked[0]])
            chosen[row, begin : begin + budget] = True
    return chosen


def _choose_spans(
    keys: Ints, maskable: Bools, starts: Bools, budgets: Ints, settings: config.Masking
) -> tuple[Bools, Ints]:
    """What is chosen, and the place where each token's span begins: [n, S] each.

    Words are tried as beginnings in random order, and those that are taken already are passed over: the same as
    drawing among the free ones until the budget is met.
    """
    n, width = maskable.shape
    chosen, first = np.zeros_like(maskable), np.zeros((n, width), np.int64)
    order = draws(keys, width, Stream.MASK_ORDER)
    distribution = length_distribution(settings.span_mean, settings.span_max)
    lengths = np.searchsorted(np.cumsum(distribution)[:-1], draws(keys, width, Stream.MASK_LENGTH)) + 1
    for row, budget in enumerate(budgets.tolist()):
        begins, ends = (x.tolist() for x in _words(maskable[row], starts[row]))
        ranked = np.argsort(order[row, begins], kind="stable").tolist() if begins else []
        taken, left = [False] * len(begins), budget
        for head in ranked:
            for word in range(head, min(head + int(lengths[row, begins[head]]), len(begins))):
                broken = word > head and ends[word - 1] != begins[word]
                if broken or taken[word] or ends[word] - begins[word] > left:
                    break
                taken[word] = True
                chosen[row, begins[word] : ends[word]] = True
                first[row, begins[word] : ends[word]] = begins[head]
                left -= ends[word] - begins[word]
            if not left:
                break
        if left == budget and budget:
            place = slice(begins[ranked[0]], begins[ranked[0]] + budget)
            chosen[row, place], first[row, place] = True, begins[ranked[0]]
    return chosen, first


@lru_cache
def length_distribution(mean: float, longest: int) -> NDArray[np.float64]:
    """Probabilities of the lengths 1 to `longest`, proportional to (1 - p)^length, with this mean: fp64 [longest].

    Raises:
        JobError: no such distribution falls with the length.
    """
    if not 1 <= mean <= (longest + 1) / 2:
        rule = f"must be in [1, {(longest + 1) / 2:g}], the means of falling distributions up to span_max = {longest}"
        raise JobError("objective.masking.span_mean", mean, rule, min(max(mean, 1.0), (longest + 1) / 2))
    length = np.arange(1, longest + 1)
    low, high = 0.0, 1.0  # of the ratio q = 1 - p; the mean grows with it
    for _ in range(60):
        ratio = (low + high) / 2
        weights = ratio ** (length - 1)
        low, high = (ratio, high) if (weights * length).sum() < mean * weights.sum() else (low, ratio)
    return weights / weights.sum()
