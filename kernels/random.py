"""Random numbers that are a function of names and coordinates, and of nothing else.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns a 64-bit key and a
128-bit counter into 128 random bits. A key stands for (seed, step, parameter or module), a counter for global
coordinates, so any rank computes the numbers of any slice, and no generator state exists to be saved.

Words are 32-bit values held in int64 tensors: plain torch arithmetic, the same bits on every device, eager or
compiled.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headway.kernels import philox_host

_WORD = 0xFFFFFFFF
(_M0, _M1), (_W0, _W1) = philox_host.MULTIPLIERS, philox_host.INCREMENTS

Words = tuple[Tensor, Tensor, Tensor, Tensor]
Coordinates = tuple[Tensor, Tensor | int, Tensor | int]


def key(seed: int, *names: object) -> int:
    """A 64-bit key of a seed and any names (strings, integers); signed, so that an int64 tensor holds it.

    Names are told apart by quotes and commas: ("ab", "c") and ("a", "bc") give different keys.
    """
    digest = hashlib.blake2b(repr((seed, *names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def philox(key: Any, c0: Any, c1: Any, c2: Any, c3: Any) -> Words:
    """Four words from a key (64 bits) and a counter of four words: integers or int64 tensors, which broadcast."""
    if _on_host(key, c0, c1, c2, c3):
        given = [_numpy(v) for v in (key, c0, c1, c2, c3)]
        found = torch.empty((4, *philox_host.shape_of(*given)), dtype=torch.int64)
        out = found.numpy()
        for where, words in philox_host.words(given[0], (given[1], given[2], given[3], given[4])):
            for i, word in enumerate(words):
                out[i, ...][where] = word
        return found[0], found[1], found[2], found[3]
    # Inductor (torch 2.13) folds multiples of an arange into index arithmetic, and vectorises those wrongly on CPU;
    # a xor with a loaded zero keeps the words out of its sight. A test holds compiled words to eager ones.
    zero = key & 0
    c0, c2 = c0 ^ zero, c2 ^ zero
    k0, k1 = key & _WORD, (key >> 32) & _WORD
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(_M0, c0), _product(_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1, low1, high0 ^ c3, low0
        c0 ^= k0  # in place, as in `_product`: not compiled, memory traffic is what costs
        c2 ^= k1
        k0, k1 = (k0 + _W0) & _WORD, (k1 + _W1) & _WORD
    return c0, c1, c2, c3


def _product(multiplier: int, word: Any) -> tuple[Any, Any]:
    """High and low word of a product, without signed overflow, which compiled C++ does not define.

    With m' = m - 2^32 (both multipliers exceed 2^31) the product m' w stays within int64, and m w = m' w + 2^32 w.
    """
    p = (multiplier - 2**32) * word
    high = p >> 32
    high += word
    high &= _WORD
    p &= _WORD
    return high, p


def _on_host(*values: Any) -> bool:
    """Whether these are on the CPU, and nothing is being compiled or traced."""
    tensors = [v for v in values if isinstance(v, Tensor)]
    return not torch.compiler.is_compiling() and all(type(t) is Tensor and t.is_cpu for t in tensors)


def _numpy(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) else value


def uniform(key: int | Tensor, *coordinates: Tensor | int) -> Tensor:
    """Uniform numbers in (0, 1), fp64: one for each broadcast coordinate.

    Args:
        key: see `key`.
        coordinates: one to four integers or int64 tensors, each in [0, 2^32); at least one a tensor.
    """
    given = [c if isinstance(c, Tensor) else torch.tensor(c) for c in coordinates]
    zero = torch.zeros((), dtype=torch.int64, device=given[0].device)
    c0, c1, c2, c3 = (*given, *[zero] * (4 - len(given)))
    return _open_interval(philox(key, c0, c1, c2, c3)[0])


def normal(key: int | Tensor, rows: Tensor, start: int, stop: int) -> Tensor:
    """Standard normal numbers of columns [start, stop) of the given rows.

    Element (row, column) depends on the key, row and column alone: slices of a matrix have the bits of the whole.
    One Philox call serves four columns.

    Args:
        rows: int64 [R], each in [0, 2^64).
        start, stop: columns, within [0, 2^32).

    Returns:
        fp32 [R, stop - start].
    """
    return _normal_quantile(_uniform_table(key, rows, start, stop)).float()


def truncated_normal(key: int | Tensor, rows: Tensor, start: int, stop: int) -> Tensor:
    """As `normal`, cut off at two deviations: the quantile of uniform numbers between Phi(-2) and Phi(2).

    Their own standard deviation is 0.8796, as that of TensorFlow's truncated normal.
    """
    u = _uniform_table(key, rows, start, stop)
    return _normal_quantile(_PHI_MINUS_2 + u * (1 - 2 * _PHI_MINUS_2)).float()


def centred_uniform(key: int | Tensor, rows: Tensor, start: int, stop: int) -> Tensor:
    """As `normal`, but uniform in (-1, 1)."""
    return (2 * _uniform_table(key, rows, start, stop) - 1).float()


def _uniform_table(key: int | Tensor, rows: Tensor, start: int, stop: int) -> Tensor:
    """Uniform numbers in (0, 1), fp64, for `normal` and its kin."""
    groups = torch.arange(start // 4, -(-stop // 4), device=rows.device)
    words = philox(key, groups, (rows & _WORD)[:, None], ((rows >> 32) & _WORD)[:, None], 0)
    flat = torch.stack(words, -1).flatten(1)
    offset = start % 4
    return _open_interval(flat[:, offset : offset + stop - start])


def keep(key: Tensor, p: float, coordinates: Coordinates, stop: int, start: int = 0) -> Tensor:
    """Dropout's mask over columns [start, stop) of a last dim, true where an element is kept.

    Sixteen bits decide an element, so one Philox call serves eight; p is rounded to a multiple of 2^-16.

    Args:
        key: int64, 0-dim.
        p: chance of being dropped.
        coordinates: three words that broadcast to the leading shape; the column is the fourth.

    Returns:
        bool [..., stop - start].
    """
    a, b, c = (x.unsqueeze(-1) if isinstance(x, Tensor) else x for x in coordinates)
    groups = torch.arange(start // 8, -(-stop // 8), device=key.device)
    least, offset = threshold(p), start % 8
    if _on_host(key, a, b, c):
        lanes = _lanes_on_host(least, key, groups, c, b, a)
    else:
        words = philox(key, groups, c, b, a)
        halves = [((w & 0xFFFF) >= least, w >= least << 16) for w in words]
        lanes = torch.stack(
            [kept for pair in halves for kept in pair], -1
        )  # bytes: an eighth of the words' memory
    return lanes.flatten(-2)[..., offset : offset + stop - start]


def _lanes_on_host(least: int, *given: Any) -> Tensor:
    """Which of each word's low and high halves reach `least`: bool [..., 8], of a key and four counters."""
    key, c0, c1, c2, c3 = map(_numpy, given)
    lanes = torch.empty((*philox_host.shape_of(key, c0, c1, c2, c3), 8), dtype=torch.bool)
    out = lanes.numpy()
    for where, words in philox_host.words(key, (c0, c1, c2, c3)):
        halves = np.stack(words, -1).astype("<u4").view("<u2")  # of a word the low half comes first
        np.greater_equal(halves, least, out=out[where])
    return lanes


def kept_scale(p: float) -> float:
    """What kept elements are multiplied by: one over the chance, as rounded, of being kept."""
    return 1 / (1 - threshold(p) / 65536)


def threshold(p: float) -> int:
    """The sixteen bits below which an element is dropped."""
    return round(p * 65536)


def _open_interval(word: Tensor) -> Tensor:
    return (word.double() + 0.5) * 2.0**-32


# Acklam's rational approximation of the normal quantile (2003; relative error below 1.2e-9, and fp32 keeps 6e-8).
# Only + - * / and sqrt, which IEEE 754 rounds exactly: the same bits on a vector lane, a tail and another device.
# Libraries' log and cos do not promise that.
_A = (-39.69683028665376, 220.9460984245205, -275.9285104469687, 138.3577518672690, -30.66479806614716,
      2.506628277459239)  # fmt: skip
_B = (-54.47609879822406, 161.5858368580409, -155.6989798598866, 66.80131188771972, -13.28068155288572, 1.0)
_C = (-0.007784894002430293, -0.3223964580411365, -2.400758277161838, -2.549732539343734, 4.374664141464968,
      2.938163982698783)  # fmt: skip
_D = (0.007784695709041462, 0.3224671290700398, 2.445134137142996, 3.754408661907416, 1.0)
_TAIL = 0.02425
_PHI_MINUS_2 = 0.022750131948179207


def _normal_quantile(u: Tensor) -> Tensor:
    """Quantile of the standard normal at u in (0, 1), fp64."""
    q = u - 0.5
    centre = q * _polynomial(_A, q * q) / _polynomial(_B, q * q)
    r = torch.sqrt(-2 * _log(torch.minimum(u, 1 - u)))
    tail = _polynomial(_C, r) / _polynomial(_D, r)
    return torch.where(q.abs() <= 0.5 - _TAIL, centre, torch.where(q < 0, tail, -tail))


def _log(x: Tensor) -> Tensor:
    """Natural logarithm to about 1e-10 by exactly rounded operations: log m + e log 2, m in [1/2, 1)."""
    m, e = torch.frexp(x)
    s = (m - 0.75) / (m + 0.75)  # log(m / 0.75) = 2 atanh s with |s| <= 1/5
    series = _polynomial((1 / 13, 1 / 11, 1 / 9, 1 / 7, 1 / 5, 1 / 3, 1.0), s * s)
    return 2 * s * series + e.double() * 0.6931471805599453 - 0.2876820724517809


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        value = value * x + c
    return value
