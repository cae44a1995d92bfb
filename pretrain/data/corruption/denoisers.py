"""UL2: a mixture of denoisers (Tay et al. 2022, section 3.1), and the split of rows into prefix and continuation.

Shapes: `n` rows, `R` raw tokens in a row, `S` of the inputs, `T` of the targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from headway.pretrain.data.corruption import spans
from headway.pretrain.data.corruption.noise import Ints, Stream, draws
from headway.pretrain.data.specials import Specials
from headway.pretrain.errors import JobError

if TYPE_CHECKING:
    from headway.pretrain import config


class Pairs(NamedTuple):
    """Inputs and targets of different lengths: int64 [n, S] and [n, T], padded; lengths int64 [n]."""

    inputs: Ints
    targets: Ints
    input_lengths: Ints
    target_lengths: Ints


def lengths(seq_len: int, denoisers: Sequence[config.Denoiser]) -> tuple[int, int]:
    """Raw tokens of a row, and T: with them, whatever denoiser a row gets, nothing of it is lost.

    Args:
        seq_len: S, the mode token before a row and the separator after it included.

    Raises:
        JobError: rows are too short, or a denoiser's spans cannot be kept apart.
    """
    if seq_len < 4:
        rule = "a mode token, a token, a sentinel and the separator must fit into the inputs"
        raise JobError("data.seq_len", seq_len, rule, 4)
    fitting = [spans.lengths(seq_len - 1, d.rate, d.mean)[0] if d.rate else seq_len - 1 for d in denoisers]
    raw = min(fitting)
    # A prefix of one token leaves raw - 1; the separator follows.
    return raw, max(sum(spans.counts(raw, d.rate, d.mean)) + 1 if d.rate else raw for d in denoisers)


def choose(keys: Ints, denoisers: Sequence[config.Denoiser]) -> Ints:
    """Which denoiser each row gets, by their weights: int64 [n]."""
    edges = np.cumsum([d.weight for d in denoisers])
    return np.searchsorted(edges[:-1] / edges[-1], draws(keys, 1, Stream.DENOISER)[:, 0], side="right")


def corrupt(
    tokens: Ints,
    keys: Ints,
    denoisers: Sequence[config.Denoiser],
    specials: Specials,
    seq_len: int,
    target_len: int,
) -> Pairs:
    """Rows behind their mode tokens, each corrupted by the denoiser that its key chooses.

    R and X are span corruption (`spans.corrupt`), S is a prefix split (`split_prefix`).

    Args:
        tokens: int64 [n, R], R as `lengths` says.
        keys: int64 [n].
        seq_len, target_len: S and T, at least as `lengths` says.

    Raises:
        JobError: more spans than sentinels.
    """
    n = len(tokens)
    result = _empty(n, seq_len, target_len, specials)
    which = choose(keys, denoisers)
    for i, denoiser in enumerate(denoisers):
        mine = np.flatnonzero(which == i)
        if not mine.size:
            continue
        if denoiser.rate:
            inputs, targets = spans.corrupt(tokens[mine], keys[mine], denoiser, specials)
            part = Pairs(inputs, targets, *(np.full(mine.size, x.shape[1]) for x in (inputs, targets)))
        else:
            part = split_prefix(tokens[mine], keys[mine], specials, seq_len - 1, target_len)
        result.inputs[mine, 0] = specials.ids[f"mode_{denoiser.mode}"]
        result.inputs[mine, 1 : part.inputs.shape[1] + 1] = part.inputs
        result.targets[mine, : part.targets.shape[1]] = part.targets
        result.input_lengths[mine] = part.input_lengths + 1
        result.target_lengths[mine] = part.target_lengths
    return result


def prefix_lengths(keys: Ints, seq_len: int) -> Ints:
    """Where rows of `seq_len` >= 2 tokens are split: int64 [n], uniform in [1, seq_len - 1] (T5's prefix LM)."""
    return 1 + (draws(keys, 1, Stream.PREFIX)[:, 0] * (seq_len - 1)).astype(np.int64)


def split_prefix(tokens: Ints, keys: Ints, specials: Specials, seq_len: int, target_len: int) -> Pairs:
    """Rows cut at `prefix_lengths`: the inputs are the prefix, the targets the rest, each with the separator behind.

    Args:
        tokens: int64 [n, R]; R <= min(seq_len, target_len), so that whatever the cut is, both parts fit.
    """
    n, raw = tokens.shape
    prefix = prefix_lengths(keys, raw)
    result = _empty(n, seq_len, target_len, specials)
    place, at = np.arange(raw), prefix[:, None]
    result.inputs[:, :raw] = np.where(place < at, tokens, specials.ids["pad"])
    result.inputs[np.arange(n), prefix] = specials.separator
    shifted = np.take_along_axis(tokens, np.minimum(place + at, raw - 1), 1)
    result.targets[:, :raw] = np.where(place < raw - at, shifted, specials.ids["pad"])
    result.targets[np.arange(n), raw - prefix] = specials.separator
    result.input_lengths[:], result.target_lengths[:] = prefix + 1, raw - prefix + 1
    return result


def _empty(n: int, seq_len: int, target_len: int, specials: Specials) -> Pairs:
    pad = specials.ids["pad"]
    zeros = np.zeros(n, np.int64)
    return Pairs(np.full((n, seq_len), pad), np.full((n, target_len), pad), zeros, zeros.copy())
