"""Span corruption (Raffel et al. 2020, section 3.1.4): spans become sentinels, and the target spells them out.

    tokens    a b c d e f g h
    inputs    a b <0> e f g <1> </s>
    targets   <0> c d <1> h </s>

How many tokens and spans are noise depends on the row's length alone, so all rows get the same lengths and nothing
is padded.

Shapes: `n` rows, `R` raw tokens in a row, `S` of the inputs, `T` of the targets.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from headway.pretrain.data.corruption.noise import Bools, Ints, Stream, draws
from headway.pretrain.data.specials import Specials
from headway.pretrain.errors import JobError


class Noise(Protocol):
    """`config.Spans`, or `config.Denoiser` with a rate above 0."""

    @property
    def rate(self) -> float: ...
    @property
    def mean(self) -> float: ...


def counts(raw: int, rate: float, mean: float) -> tuple[int, int]:
    """Tokens that are noise, and the spans that they form, in a row of `raw` >= 2 tokens; see T5's
    `random_spans_noise_mask`.

    Raises:
        JobError: so many spans cannot be kept apart.
    """
    noise, spans = _counts(raw, rate, mean)
    if spans > (most := min(noise, raw - noise)):
        rule = f"{noise} of {raw} tokens would form {spans} spans, but at most {most} can be apart"
        raise JobError("objective.spans.mean", mean, rule, -(-noise // most))
    return noise, spans


def _counts(raw: int, rate: float, mean: float) -> tuple[int, int]:
    noise = min(max(round(raw * rate), 1), raw - 1)
    return noise, max(round(noise / mean), 1)


def lengths(seq_len: int, rate: float, mean: float) -> tuple[int, int]:
    """Raw tokens of a row whose inputs have exactly `seq_len` tokens, and the length of its target.

    Both count the separator at their ends. The most raw tokens that fit are taken: T5's `random_spans_helper`, with
    its preference at rate 0.5 for targets as long as the inputs. 512 tokens, 0.15 and 3 give 568 and 114.

    Raises:
        JobError: rows are too short, or `counts` refuses.
    """
    if seq_len < 3:
        raise JobError(
            "data.seq_len", seq_len, "a token, a sentinel and the separator must fit into inputs", 3
        )

    def measure(raw: int) -> tuple[int, int]:
        noise, spans = _counts(raw, rate, mean)
        return raw - noise + spans + 1, noise + spans + 1

    raw = 2
    while measure(raw + 1)[0] <= seq_len:
        raw += 1
    if rate == 0.5 and measure(raw)[1] > seq_len == measure(raw - 1)[0]:
        raw -= 1
    counts(raw, rate, mean)
    return raw, measure(raw)[1]


def corrupt(tokens: Ints, keys: Ints, settings: Noise, specials: Specials) -> tuple[Ints, Ints]:
    """Inputs and targets of span corruption.

    Spans alternate, beginning with one that is kept and ending with noise; subject to this and to `counts`, all ways
    to cut the row are equally likely (T5's `random_spans_noise_mask`).

    Args:
        tokens: int64 [n, R].
        keys: int64 [n].

    Returns:
        inputs int64 [n, S], targets int64 [n, T], both with the separator at the end.

    Raises:
        JobError: more spans than sentinels.
    """
    noise, spans = counts(tokens.shape[1], settings.rate, settings.mean)
    if spans > len(specials.sentinels):
        rule = f"a row of {tokens.shape[1]} tokens has {spans} spans, and each takes a sentinel"
        raise JobError("objective.spans.sentinels", len(specials.sentinels), rule, spans)
    mask = noise_mask(keys, tokens.shape[1], noise, spans)
    return _fold(tokens, mask, specials), _fold(tokens, ~mask, specials)


def noise_mask(keys: Ints, raw: int, noise: int, spans: int) -> Bools:
    """Which tokens are noise: bool [n, raw], `noise` of them in `spans` spans."""
    kept = _segments(keys, raw - noise, spans, Stream.SPAN_KEPT)
    gone = _segments(keys, noise, spans, Stream.SPAN_NOISE)
    both = np.stack([kept, gone], -1).reshape(len(keys), 2 * spans)
    change = np.zeros((len(keys), raw), np.int64)
    np.put_along_axis(change, np.cumsum(both, 1)[:, :-1], 1, 1)
    return np.cumsum(change, 1) % 2 == 1


def _segments(keys: Ints, items: int, parts: int, stream: Stream) -> Ints:
    """Positive lengths that add up to `items`: int64 [n, parts], all equally likely."""
    cuts = np.argsort(draws(keys, items - 1, stream), axis=1, kind="stable")[:, : parts - 1] + 1
    edges = np.zeros((len(keys), parts + 1), np.int64)
    edges[:, 1:-1], edges[:, -1] = np.sort(cuts, 1), items
    return np.diff(edges, axis=1)


def _fold(tokens: Ints, hidden: Bools, specials: Specials) -> Ints:
    """Tokens with sentinel k in place of the k-th hidden span, and the separator at the end."""
    first = hidden.copy()
    first[:, 1:] &= ~hidden[:, :-1]
    span = np.cumsum(first, 1) - 1
    shown = np.where(first, np.array(specials.sentinels, np.int64)[span], tokens)
    rows = shown[first | ~hidden].reshape(len(tokens), -1)
    return np.concatenate([rows, np.full((len(tokens), 1), specials.separator)], 1)
