"""Distillation of attention maps: losses of two models' scores, and gradients of the student's.

Shapes: B batch, H student heads, G teacher heads for each, Q queries, S keys, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headway.kernels.attention.masks import Mask
from headway.kernels.attention.scopes import Dilated, Window
from headway.kernels.attention.slopes import Distances, Fixed, Slopes, geometric
from headway.kernels.maps import reference
from headway.kernels.maps.operands import Scores, Seen
from headway.kernels.triton.map_distillation import sums
from headway.tests.kernels.triton import map_costs as costs
from headway.tests.kernels.triton.map_rounding import FINE, Problem, tolerances
from headway.tests.kernels.triton.proof import Case, Result, drawn, seed

ROUNDING = {torch.float32: FINE, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
_F, _B, _H = torch.float32, torch.bfloat16, torch.float16


class Sizes(NamedTuple):
    """Samples; query heads and key heads of the student, and of the teacher; queries, keys; head dimensions of both."""

    batch: int
    heads: tuple[int, int]
    teacher_heads: tuple[int, int]
    queries: int
    keys: int
    dims: tuple[int, int]


Masks = Callable[[Sizes], Seen]


class Extra(NamedTuple):
    """What else there is.

    Attributes:
        biases: of teacher and student: `learned`, `shared`, `slopes`, `distances`, `far` (learned, beside 1e4 or -1e4,
            the same of both) or none.
        scale: factor of standard normal queries.
        teacher_dtype: where it is another.
        relation: whether keys are the queries themselves (MiniLM, Wang et al. 2020, 3.2).
    """

    biases: tuple[str, str] = ("", "")
    scale: float = 1.0
    teacher_dtype: torch.dtype | None = None
    relation: bool = False


def _case(loss: str, sizes: Sizes, dtype: torch.dtype, masks: Masks, extra: Extra = Extra()) -> Case:
    def compute(device: torch.device) -> Mapping[str, Result]:
        draw = torch.Generator().manual_seed(seed())
        models = (
            (sizes.teacher_heads, sizes.dims[0], extra.teacher_dtype or dtype, extra.biases[0]),
            (sizes.heads, sizes.dims[1], dtype, extra.biases[1]),
        )
        teacher, student = (_model(draw, sizes, extra, *model) for model in models)
        seen = masks(sizes)
        rows = seen.rows(student)
        upstream = torch.randn(sizes.batch, generator=draw)
        leaves = _leaves(_on(student, device))
        ours = sums(_on(teacher, device), _of(student, leaves), loss, _on(seen, device), _on(rows, device))
        found = torch.autograd.grad(ours, list(leaves.values()), upstream.to(device))
        wide = _leaves(_wide(student))
        wanted = reference.sums(_wide(teacher), _of(_wide(student), wide), loss, seen, rows)
        gradients = torch.autograd.grad(wanted, list(wide.values()), upstream.double())
        far = _tolerances(teacher, student, loss, seen, rows, upstream, dtype)
        if extra.relation:
            far["d_q"] += far["d_k"]
        results = {"sums": Result(ours, wanted, far["sums"])}
        for name, gradient, true in zip(leaves, found, gradients, strict=True):
            results[f"d_{name}"] = Result(gradient, true, far[f"d_{name}"])
        return results

    return compute


def _model(
    draw: torch.Generator, sizes: Sizes, extra: Extra, heads: tuple[int, int], dim: int, dtype: torch.dtype, bias: str
) -> Scores:  # fmt: skip
    """A model's scores; queries and keys are [B, S, H, D] in memory, as projections give them."""
    q, k = (
        drawn(draw, sizes.batch, length, count, dim, dtype=dtype).detach().transpose(1, 2)
        for length, count in zip((sizes.queries, sizes.keys), heads, strict=True)
    )
    q = q * extra.scale
    return Scores(q, q if extra.relation else k, dim**-0.5, _bias(draw, sizes, heads[0], bias))


def _bias(draw: torch.Generator, sizes: Sizes, heads: int, kind: str) -> Fixed | None:
    shape = sizes.queries, sizes.keys
    if kind == "slopes":
        return Slopes(torch.tensor(geometric(heads)), *(torch.arange(length) for length in shape))
    if kind == "distances":
        return Distances.whole(torch.randn(heads, 2 * sizes.keys - 1, generator=draw), sizes.keys)
    if kind == "shared":
        return torch.randn(1, *shape, generator=draw).expand(heads, *shape)
    if kind == "far":
        signs = torch.randn(shape, generator=torch.Generator().manual_seed(seed())).sign()
        return torch.randn(heads, *shape, generator=draw) + 1e4 * signs
    return torch.randn(heads, *shape, generator=draw) if kind == "learned" else None


def _leaves(student: Scores) -> dict[str, Tensor]:
    """What gets a gradient: keys that are the queries do not count twice."""
    found = {"q": student.q} | ({} if student.k is student.q else {"k": student.k})
    if isinstance(student.bias, Tensor):
        found["bias"] = student.bias
    return {name: x.detach().requires_grad_() for name, x in found.items()}


def _of(student: Scores, leaves: dict[str, Tensor]) -> Scores:
    """The student with its leaves in place."""
    return student._replace(
        q=leaves["q"], k=leaves.get("k", leaves["q"]), bias=leaves.get("bias", student.bias)
    )


def _on(x: Any, device: torch.device) -> Any:
    """A description with its tensors on a device; one that stands twice is there once."""
    if isinstance(x, Scores) and x.k is x.q:
        q = x.q.to(device)
        return Scores(q, q, x.scale, _on(x.bias, device))
    if isinstance(x, tuple):
        return type(x)(*(_on(each, device) for each in x))
    return x.to(device) if isinstance(x, Tensor) else x


def _wide(model: Scores) -> Scores:
    q = model.q.double()
    k = q if model.k is model.q else model.k.double()
    bias = model.bias.double() if isinstance(model.bias, Tensor) else model.bias
    return Scores(q, k, model.scale, bias)


def _tolerances(
    teacher: Scores, student: Scores, loss: str, seen: Seen, rows: Tensor | None, upstream: Tensor, dtype: torch.dtype
) -> dict[str, float]:  # fmt: skip
    batch, _, queries, _ = student.q.shape
    pairs = torch.ones(batch, 1, queries, student.k.shape[2], dtype=torch.bool)
    block = seen.block(student)
    pairs = pairs if block is None else pairs & block
    pairs = pairs if rows is None else pairs & rows[:, None, :, None]
    given = _wide(teacher), _wide(student), loss, pairs, upstream.double(), ROUNDING[dtype]
    return tolerances(Problem(*given))


def _twins(loss: str) -> Case:
    """A student that is its teacher has no loss and no gradient: both scores are the same numbers. Logarithms are
    rounded to 2^-25 of 3, in 20 rows, in either direction."""

    def compute(device: torch.device) -> Mapping[str, Result]:
        draw = torch.Generator().manual_seed(seed())
        sizes = Sizes(1, (2, 2), (2, 2), 20, 20, (40, 40))
        student = _on(_model(draw, sizes, Extra(), (2, 2), 40, _F, ""), device)
        leaves = _leaves(student)
        found = sums(student, _of(student, leaves), loss, Seen(Mask()), None)
        gradients = torch.autograd.grad(found.sum(), list(leaves.values()))
        results = {"sums": found} | {f"d_{name}": x for name, x in zip(leaves, gradients, strict=True)}
        return {name: Result(x, torch.zeros(x.shape).double(), 8 * FINE) for name, x in results.items()}

    return compute


# -- masks ---------------------------------------------------------------------------------------------------------


def _full(sizes: Sizes) -> Seen:
    return Seen(Mask(False))


def _causal(sizes: Sizes) -> Seen:
    return Seen(Mask())


def _packed(causal: bool) -> Masks:
    def masks(sizes: Sizes) -> Seen:
        """Three documents, then padding, of a sequence; of the last sample two and much padding."""
        places = torch.arange(sizes.queries)
        rows = [torch.where(places > sizes.queries - 4, -1, places * 3 // sizes.queries)] * sizes.batch
        rows[-1] = torch.where(places > sizes.queries // 2, -1, places // 9 % 2)
        return Seen(Mask(causal, torch.stack(rows)))

    return masks


def _padded(sizes: Sizes) -> Seen:
    """Other keys, of which the last sample sees none; the last of the queries are padding."""
    queries = torch.where(torch.arange(sizes.queries) > sizes.queries - 6, -1, 0).repeat(sizes.batch, 1)
    keys = torch.where(torch.arange(sizes.keys) > sizes.keys - 10, -1, 0).repeat(sizes.batch, 1)
    keys[-1] = 3
    return Seen(Mask(False, queries, keys))


def _prefixed(sizes: Sizes) -> Seen:
    return Seen(Mask(prefix=torch.arange(sizes.batch) * 40))


def _windowed(sizes: Sizes) -> Seen:
    return Seen(Mask(scope=Window(19)))


def _near(sizes: Sizes) -> Seen:
    return Seen(Mask(False, scope=Window(9)))


def _prefixed_window(sizes: Sizes) -> Seen:
    return Seen(Mask(prefix=torch.full((sizes.batch,), 60), scope=Window(20)))


def _strided(sizes: Sizes) -> Seen:
    return Seen(Mask(scope=Dilated(4, 3)))


def _later(sizes: Sizes) -> Seen:
    """A part of a sequence whose keys come before."""
    return Seen(Mask(shift=-20))


def _pairs(sizes: Sizes) -> Tensor:
    """Any pairs, the same of all samples; one row sees nothing."""
    draw = torch.Generator().manual_seed(seed())
    pairs = torch.rand(1, 1, sizes.queries, sizes.keys, generator=draw) < 0.5
    pairs[:, :, sizes.queries // 2] = False
    return pairs


def _spotted(sizes: Sizes) -> Seen:
    return Seen(Mask(), _pairs(sizes))


def _strided_spots(sizes: Sizes) -> Seen:
    return Seen(Mask(scope=Dilated(4, 3)), _pairs(sizes))


def _hidden(sizes: Sizes) -> Seen:
    """Nobody sees anything."""
    zeros = torch.zeros(sizes.batch, sizes.queries, dtype=torch.int64)
    return Seen(Mask(False, zeros, torch.ones(sizes.batch, sizes.keys, dtype=torch.int64)))


# -- cases ---------------------------------------------------------------------------------------------------------


def _sizes(
    queries: int,
    keys: int = 0,
    dims: tuple[int, int] = (40, 40),
    heads: tuple[int, int] = (2, 2),
    teacher_heads: tuple[int, int] = (2, 2),
    batch: int = 1,
) -> Sizes:
    return Sizes(batch, heads, teacher_heads, queries, keys or queries, dims)


_ONE: dict[str, Any] = {"heads": (1, 1), "teacher_heads": (1, 1)}
_TWO = _sizes(50, batch=2)
_LEARNED = Extra(("", "learned"))
_AVERAGED = _sizes(40, dims=(16, 24), teacher_heads=(6, 2))
OFTEN = ("js, bf16, averaged teacher heads", "reverse_kl, fp32, logits of 1e4", "kl, fp16")
CASES: dict[str, Case] = {
    "js, bf16, documents, learned bias": _case(
        "js", _sizes(33, dims=(40, 64), heads=(2, 1), batch=2), _B, _packed(True), Extra(("slopes", "learned"))
    ),
    "kl, fp32, causal, grouped keys": _case("kl", _sizes(67, heads=(4, 2), teacher_heads=(4, 1)), _F, _causal),
    "kl, bf16, causal, grouped keys": _case("kl", _sizes(131, dims=(80, 64), heads=(2, 1)), _B, _causal),
    "kl, bf16, learned bias": _case("kl", _sizes(33, 70, (64, 64), batch=2), _B, _full, _LEARNED),
    "reverse_kl, fp32": _case("reverse_kl", _sizes(70, dims=(32, 24)), _F, _full),
    "reverse_kl, bf16, window": _case("reverse_kl", _sizes(150, dims=(64, 64)), _B, _windowed),
    "js, fp32, one head": _case("js", _sizes(70, **_ONE), _F, _full),
    "mse, fp32, documents": _case("mse", _TWO, _F, _packed(False)),
    "mse, bf16, prefix, learned bias": _case("mse", _sizes(70, dims=(64, 40), batch=2), _B, _prefixed, _LEARNED),
    "scores, fp32, documents": _case("scores", _TWO, _F, _packed(True)),
    "scores, bf16, causal, learned bias": _case("scores", _sizes(66, dims=(64, 64)), _B, _causal, _LEARNED),
    **{
        f"{loss}, fp32, averaged teacher heads": _case(loss, _AVERAGED, _F, _causal)
        for loss in ("kl", "reverse_kl", "scores")
    },
    "js, bf16, averaged teacher heads": _case("js", _AVERAGED, _B, _causal),
    "mse, bf16, averaged wide teacher heads": _case(
        "mse", _sizes(20, 0, (128, 40), (1, 1), (3, 1)), _B, _causal, Extra(("learned", "learned"))
    ),
    "kl, fp32, prefix": _case("kl", _sizes(70, batch=2), _F, _prefixed),
    "kl, fp32, window both ways": _case("kl", _sizes(100, **_ONE), _F, _near),
    "mse, fp32, window behind a prefix": _case("mse", _sizes(100, **_ONE), _F, _prefixed_window),
    "kl, fp32, dilated scope": _case("kl", _TWO, _F, _strided),
    "mse, fp32, pairs and a scope": _case("mse", _TWO, _F, _strided_spots),
    "js, fp32, pairs and causality, biases": _case("js", _TWO, _F, _spotted, Extra(("shared", "slopes"))),
    "kl, fp32, part of a sequence": _case("kl", _sizes(40, 60), _F, _later),
    "kl, fp32, biases by distance": _case("kl", _sizes(50), _F, _causal, Extra(("distances", "slopes"))),
    **{f"{loss}, fp32, hidden sample": _case(loss, _sizes(40, 50, batch=2), _F, _padded) for loss in ("kl", "js")},
    **{f"{loss}, nothing seen": _case(loss, _sizes(20, 30), _F, _hidden, _LEARNED) for loss in ("kl", "mse")},
    "js, bf16, nothing seen": _case("js", _sizes(20, 30), _B, _hidden, _LEARNED),
    "kl, fp32, one row": _case("kl", _sizes(1, **_ONE), _F, _causal),
    "reverse_kl, bf16, one query": _case("reverse_kl", _sizes(1, 65, (128, 64), (1, 1), (1, 1)), _B, _full),
    "kl, bf16, head dimension 128": _case("kl", _sizes(70, dims=(128, 128), **_ONE), _B, _causal),
    "js, bf16, head dimension 256": _case("js", _sizes(50, dims=(256, 256), **_ONE), _B, _causal),
    "kl, fp32, head dimension 256": _case("kl", _sizes(20, dims=(256, 80), **_ONE), _F, _causal),
    "reverse_kl, bf16, heads of 300 and 160, averaged": _case(
        "reverse_kl", _sizes(40, 0, (300, 160), (2, 1), (4, 2)), _B, _causal, _LEARNED
    ),
    "scores, fp32, relation of 160": _case(
        "scores", _sizes(20, dims=(160, 160), **_ONE), _F, _causal, Extra(relation=True)
    ),
    "kl, fp16": _case("kl", _sizes(66, dims=(64, 40)), _H, _causal, _LEARNED),
    "mse, teacher in bf16": _case("mse", _sizes(50), _F, _causal, Extra(teacher_dtype=_B)),
    "kl, bf16, relation": _case("kl", _sizes(50, dims=(64, 40)), _B, _causal, Extra(relation=True)),
    **{
        f"{loss}, fp32, logits of 1e4": _case(loss, _sizes(40), _F, _causal, Extra(("far", "far")))
        for loss in ("kl", "reverse_kl", "js", "mse", "scores")
    },
    "js, bf16, logits of 1e4": _case("js", _sizes(40, dims=(64, 64)), _B, _causal, Extra(("far", "far"))),
    "kl, fp32, queries of 1e4": _case("kl", _sizes(40), _F, _causal, Extra(scale=1e4)),
    "kl, bf16, queries of 1e4": _case("kl", _sizes(40, dims=(64, 64)), _B, _causal, Extra(scale=1e4)),
    **{f"{loss}, fp32, its own teacher": _twins(loss) for loss in ("kl", "js")},
}  # fmt: skip


# -- sizes ---------------------------------------------------------------------------------------------------------


def _compiled(loss: str, dim: int, dtype: torch.dtype) -> Callable[[], None]:
    """All that two models' scores may have at once; a student's head has two of the teacher's, but of `kl`."""
    length, group = 256, 1 if loss == "kl" else 2
    places = torch.arange(length)

    def compute() -> None:
        q_t, q, k_t, k = (
            torch.zeros(2, heads, length, dim, dtype=dtype, requires_grad=learns)
            for heads, learns in ((4 * group, False), (4, True), (2, False), (2, True))
        )
        bias = torch.zeros(4, length, length, requires_grad=True)
        prefix = torch.zeros(2, dtype=torch.int64)
        mask = Mask(True, torch.zeros(2, length, dtype=torch.int64), None, prefix, scope=Window(100))
        seen = Seen(mask, torch.ones(2, 1, length, length, dtype=torch.bool))
        slopes = Slopes(torch.tensor(geometric(4 * group)), places, places)
        models = Scores(q_t, k_t, 1.0, slopes), Scores(q, k, 1.0, bias)
        found = sums(*models, loss, seen, torch.ones(2, length, dtype=torch.bool))
        torch.autograd.grad(found, (q, k, bias), torch.empty_like(found))

    return compute


COMPILED = {
    f"{loss}, head dimension {dim}, {dtype}": _compiled(loss, dim, dtype)
    for dtype in (_B, _F)
    for loss in ("kl", "js")
    for dim in (40, 64, 128, 256)
}
"""Of every row of tiles, and of heads whose width 16 does not divide: the loss of the pass over both models and the one
with the most arithmetic."""

COSTS = {
    "map_log_sums_kernel": costs.log_sums,
    "map_divergence_kernel": costs.divergence,
    "map_terms_kernel": costs.terms,
    "map_queries_kernel": costs.queries,
    "map_keys_kernel": costs.keys,
    "map_bias_kernel": costs.bias,
}
