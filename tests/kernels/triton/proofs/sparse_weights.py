"""Sparsemax and 1.5-entmax attention, beside the entmax package.

Shapes: B batch, H query heads, K key heads, Q queries, S keys, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from headway.kernels import random
from headway.kernels.attention.dense import WeightDropout, per_query_head
from headway.kernels.attention.masks import Mask, lower
from headway.kernels.attention.scopes import Window
from headway.kernels.attention.weights import Entmax15, Sparsemax
from headway.kernels.triton.sparse_weights import attention
from headway.kernels.triton.workloads import sparse_weights as workload
from headway.tests import oracles
from headway.tests.kernels.triton.attention_roundings import (
    ROUNDING,
    Off,
    products_off,
    sums_over_keys,
    sums_over_queries,
)
from headway.tests.kernels.triton.launches import Launch
from headway.tests.kernels.triton.proof import Case, Cost, Result, drawn, once, seed
from headway.tests.kernels.triton.sparse_costs import columns

WEIGHTINGS = {1: Sparsemax(), 2: Entmax15()}


def _package(power: int, scores: Tensor) -> Tensor:
    oracles.package_folder("entmax")
    import entmax

    found: Tensor = (entmax.sparsemax if power == 1 else entmax.entmax15)(scores, dim=-1)
    return found


def _case(
    power: int,
    mask: Mask = Mask(),
    dtype: torch.dtype = torch.float32,
    width: int = 40,
    lengths: tuple[int, int] = (70, 70),
    heads: tuple[int, int] = (1, 1),
    batch: int = 1,
    p: float = 0.0,
    size: float = 1.0,
) -> Case:
    """Operands are [B, S, H, D] in memory; `heads` of queries and of keys; `size`: of queries and keys. Sparsemax's
    gradient jumps where a score is its threshold: rows that have one so near that rounding decides get no gradient."""

    def compute(device: torch.device) -> Mapping[str, Result]:
        draw = torch.Generator().manual_seed(seed())
        counts = (
            (lengths[0], heads[0]),
            (lengths[1], heads[1]),
            (lengths[1], heads[1]),
            (lengths[0], heads[0]),
        )
        q, k, v, slope = (drawn(draw, batch, n, h, width).detach().transpose(1, 2) for n, h in counts)
        q, k, v, slope = (x.to(dtype) for x in (q * size, k * size, v, slope))
        drop = None
        if p:
            places = torch.arange(batch) + 5, torch.arange(lengths[0]) + 7
            drop = WeightDropout(p, torch.tensor(random.key(3, "weights")), *places, 2)
        wide = [x.double().requires_grad_() for x in (q, k, v)]
        out_64, weights, grows, near = _usual(power, *wide, mask, drop)
        slope = slope * ~near[..., None]
        wanted = (out_64.detach(), *torch.autograd.grad(out_64, wide, slope.double()))
        given = [x.to(device).requires_grad_() for x in (q, k, v)]
        there = _there(mask, device), WEIGHTINGS[power], None if drop is None else _there(drop, device)
        out = attention(*given, *there)
        found = (out, *torch.autograd.grad(out, given, slope.to(device)))
        operands = [x.detach() for x in wide]
        tolerances = _tolerances(power, operands, slope.double(), weights, grows, wanted, dtype)
        names = ("out", "d_q", "d_k", "d_v")
        rows = zip(names, found, wanted, tolerances, strict=True)
        return {name: Result(f, w, t) for name, f, w, t in rows}

    return compute


def _there(x, device: torch.device):
    """A description with all its tensors on a device."""
    return x._replace(**{n: y.to(device) for n, y in x._asdict().items() if isinstance(y, Tensor)})


def _usual(
    power: int, q: Tensor, k: Tensor, v: Tensor, mask: Mask, drop: WeightDropout | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, weights, what dropout multiplies them with, and rows [B, H, Q] with a score at the threshold."""
    scores = q @ per_query_head(k, q).mT * q.shape[-1] ** -0.5
    seen = lower(mask, q.shape[2], k.shape[2], q.device)
    seen = torch.ones(1, 1, *scores.shape[2:], dtype=torch.bool) if seen is None else seen
    weights = torch.where(seen, _package(power, scores.masked_fill(~seen, -1e9)), 0)
    with torch.no_grad():
        best = weights.argmax(-1, keepdim=True)
        tau = scores.gather(-1, best) / power - weights.gather(-1, best) ** (1 / power)
        near = ((scores / power - tau).abs() < _apart(q, k)) & seen
    grows = torch.ones_like(weights)
    if drop is not None:
        grows = drop.kept(q.shape[1], slice(None), slice(0, k.shape[2])) * random.kept_scale(drop.p)
    out = (weights * grows) @ per_query_head(v, q)
    return out, weights.detach(), grows.detach(), near.any(-1) & (power == 1)


def _apart(q: Tensor, k: Tensor) -> float:
    """Scores are sums of D products, of absolute values A in all and of either sign: partial sums are of some
    A / sqrt(D), and D roundings of them make 2^-24 A, here four times that of A + 1."""
    size = float((q.detach().abs() @ per_query_head(k, q).detach().abs().mT).max()) * q.shape[-1] ** -0.5
    return 4 * 2.0**-24 * (size + 1)


def _tolerances(
    power: int,
    operands: list[Tensor],
    slope: Tensor,
    weights: Tensor,
    grows: Tensor,
    wanted: tuple,
    dtype: torch.dtype,
) -> tuple[float, float, float, float]:
    """By `attention_roundings`. Scores z are off, and thresholds by their mean, weighed by g, and by roundings of
    their own: so w by POWER g of it, and of 1.5-entmax g by it, as is delta; weights and gradients of scores are
    rounded to the dtype."""
    q, k, v = operands
    scale, unit = q.shape[-1] ** -0.5, ROUNDING[dtype] / 3**0.5
    support = (weights > 0).double()
    g = support if power == 1 else weights.sqrt()
    scores_off = products_off(q, k, scale) / power * support
    total = g.sum(-1, keepdim=True).clamp(min=1e-30)
    largest = scale / power * (q @ per_query_head(k, q).mT * support).abs().amax(-1, keepdim=True)
    threshold_off = (g * scores_off).square().sum(-1, keepdim=True).sqrt() / total + 2.0**-24 * largest
    weights_off = Off(
        grows * ((unit * weights) ** 2 + (power * g * scores_off) ** 2).sqrt(),
        power * threshold_off,
        grows * g,
    )
    d_weights = grows * (slope @ per_query_head(v, q).mT)
    apart = support * (d_weights - (g * d_weights).sum(-1, keepdim=True) / total)
    product_off = g * grows * products_off(slope, v)
    of_scores = (power - 1) * apart * (scores_off**2 + threshold_off**2).sqrt()  # by what g is off
    each_squared = product_off**2 + of_scores**2
    delta_off = each_squared.sum(-1, keepdim=True).sqrt() / total
    each = (each_squared + (unit * g * apart) ** 2).sqrt()
    d_scores_off = Off(scale * each, scale * delta_off, g)
    return (
        sums_over_keys(weights_off, v, wanted[0], dtype),
        sums_over_keys(d_scores_off, k, wanted[1], dtype),
        sums_over_queries(d_scores_off, q, wanted[2], dtype),
        sums_over_queries(weights_off, slope, wanted[3], dtype),
    )


def _documents(lengths: list[list[int]], total: int) -> Tensor:
    rows = [[i for i, length in enumerate(row) for _ in range(length)] for row in lengths]
    return torch.tensor([row + [-1] * (total - len(row)) for row in rows])


_BF16 = torch.bfloat16
_PACKED = Mask(True, _documents([[20, 10], [3]], 40))
_CROSS = Mask(False, _documents([[40], [30]], 40), _documents([[45], []], 50))
_FEW = Mask(False, _documents([[5, 4]], 9), _documents([[20, 15]], 36))
OFTEN = ("entmax, scores near 0", "entmax, fp16")
CASES: dict[str, Case] = {
    "entmax, other keys, documents, grouped keys, dropout": _case(
        2, _FEW, lengths=(9, 36), heads=(2, 1), width=24, p=0.25
    ),
    "sparsemax, causal documents, grouped keys": _case(1, _PACKED, lengths=(40, 40), heads=(2, 1), batch=2),
    "sparsemax, bf16": _case(1, dtype=_BF16, width=64),
    "sparsemax, whole, width 80, dropout": _case(1, Mask(False), width=80, lengths=(40, 40), p=0.25),
    "entmax, causal documents, grouped keys": _case(2, _PACKED, lengths=(40, 40), heads=(4, 2), batch=2),
    "entmax, whole, bf16, dropout": _case(2, Mask(False), _BF16, 128, p=0.25),
    "sparsemax, a window behind a prefix": _case(1, Mask(True, prefix=torch.tensor([30]), scope=Window(20))),
    "entmax, other keys, all hidden from one sample": _case(2, _CROSS, lengths=(40, 50), batch=2),
    "sparsemax, width 256": _case(1, width=256, lengths=(40, 40)),
    "entmax, window, width 256, bf16": _case(2, Mask(False, scope=Window(9)), _BF16, 256),
    "entmax, width 144, grouped keys, dropout": _case(2, width=144, lengths=(40, 40), heads=(2, 1), p=0.25),
    "sparsemax, one row": _case(1, lengths=(1, 1), width=64),
    "entmax, one query, many keys": _case(2, Mask(False), lengths=(1, 300), width=64),
    "sparsemax, scores of 10,000": _case(1, size=40.0, width=64),
    "entmax, scores of 10,000": _case(2, size=40.0, width=64),
    "sparsemax, scores near 0": _case(1, Mask(False), size=0.1, lengths=(20, 250)),
    "entmax, scores near 0": _case(2, Mask(False), size=0.1, lengths=(20, 250)),
    "sparsemax, 300 keys of like scores": _case(1, Mask(False), size=0.4, lengths=(3, 300), width=64),
    "entmax, fp16": _case(2, dtype=torch.float16, width=64),
}


# -- sizes ---------------------------------------------------------------------------------------------------------


def _compiled(power: int, width: int, dtype: torch.dtype) -> Callable[[], None]:
    """All that a mask may have, dropout and grouped keys at once."""
    cpu = torch.device("cpu")
    mask = Mask(prefix=torch.tensor([20]), scope=Window(100))
    return lambda: workload.call(
        cpu, WEIGHTINGS[power], 256, width, mask, documents=True, drops=True, dtype=dtype
    )


COMPILED = {
    f"{of}, width {width}, {name}": _compiled(power, width, dtype)
    for power, of in ((1, "sparsemax"), (2, "entmax"))
    for name, dtype in (("bf16", _BF16), ("fp32", torch.float32))
    for width in (32, 40, 64, 80, 128, 256)
}


def _walk(launch: Launch, by_keys: bool) -> tuple[float, float, float, float]:
    """Over all programs of one head: tiles, of one pass over the other side; places that exist on the own and on the
    other side of them; and programs."""
    given = launch.arguments
    seen, sizes, m, n = given["seen"], given["sizes"], given["M"], given["N"]
    own, other = (n, m) if by_keys else (m, n)
    owned, walked = (sizes.keys, sizes.queries) if by_keys else (sizes.queries, sizes.keys)
    prefixes = [0] * sizes.batch if seen.prefix is None else seen.prefix.tolist()
    tiles = mine = theirs = 0.0
    for prefix in prefixes:
        for first in range(0, owned, own):
            if by_keys:
                start, stop = (0 if not given["CAUSAL"] or first < prefix else first), walked
            else:
                start, stop = 0, max(min(walked, first + m), prefix) if given["CAUSAL"] else walked
            if seen.window is not None:
                start = max(start, first - seen.window + 1)
                stop = min(stop, first + own + seen.window - 1)
            places = range(max(0, start) // other * other, stop, other)
            tiles += len(places)
            mine += len(places) * min(own, owned - first)
            theirs += sum(min(other, walked - place) for place in places)
    return tiles, mine, theirs, len(prefixes) * -(-owned // own)


def _walking(
    launch: Launch, by_keys: bool, passes: int, own: int, tensors: int, drops: int
) -> tuple[float, float]:
    """Bytes that all programs read as they walk: of tiles, `own` and `tensors` of the other side in all passes
    together, of masks in each, and in `drops` of them of what dropout's mask depends on; and products of one kind in
    one pass."""
    given = launch.arguments
    tiles, mine, theirs, programs = _walk(launch, by_keys)
    seen, heads = given["seen"], given["sizes"].heads
    read = (mine * own + theirs * tensors) * given["D"] * given["q"].data.element_size()
    if seen.documents is not None:
        read += passes * 4 * (mine + theirs)
    if seen.prefix is not None:
        read += 4 * (programs / (given["group"] if by_keys else 1) + passes * tiles)
    if given["drop"] is not None:
        read += drops * (16 * tiles + 8 * (theirs if by_keys else mine))
    return heads * read, heads * tiles * 2 * given["M"] * given["N"] * given["W"]


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _forward(launch: Launch) -> Cost:
    given = launch.arguments
    passes = given["PASSES"] + 2
    read, product = _walking(launch, False, passes, 0, passes + 1, 1)
    written = _bytes(given["out"].data) + _bytes(given["taus"])
    others = (8 * given["PASSES"] + 6) * product / (2 * given["W"])
    return Cost(read + _bytes(given["q"].data), written, once(launch), (passes + 1) * product, others)


def _query(launch: Launch) -> Cost:
    given = launch.arguments
    parts, share = columns(launch)
    read, product = _walking(launch, False, 2, 4 * parts, 4 + parts, 2)
    read += (_bytes(given["q"].data) + _bytes(given["d_out"].data)) * (not parts) + _bytes(given["taus"])
    written = _bytes(given["d_q"].data) + _bytes(given["delta"])
    return Cost(read, written, once(launch), (4 * share + 1) * product, 12 * product / (2 * given["W"]))


def _key(launch: Launch) -> Cost:
    given = launch.arguments
    of_keys, of_values = given["OF_KEYS"], given["OF_VALUES"]
    parts, share = columns(launch)
    tensors = 1 + 2 * of_keys + of_values if parts else 2
    read, product = _walking(launch, True, 1, (1 + of_keys) * parts, tensors, 1)
    rows = given["sizes"].heads * _walk(launch, True)[2]
    read += (1 + of_keys) * (4 * rows + _bytes(given["k"].data) * (not parts))
    written = of_keys * _bytes(given["d_k"].data) + of_values * _bytes(given["d_v"].data)
    products = (share * (1 + of_keys) + of_keys + of_values) * product
    return Cost(read, written, once(launch), products, 8 * product / (2 * given["W"]))


COSTS = {
    "sparse_weights_forward_kernel": _forward,
    "sparse_weights_query_kernel": _query,
    "sparse_weights_key_kernel": _key,
}
