"""Map distillation by Triton kernels: what `kernels.map_distillation` computes, on GPUs, in O(S) memory.

No well-kept library has it: FlashAttention and SDPA give no maps, and two models' maps cannot be compared without them.
The forward keeps log-sum-exps of the rows and what the loss makes of them; the backward computes scores again, tile by
tile, once for queries and once for keys. `map_kernels` has the loops, `map_losses` the mathematics.

Shapes: B batch, H query heads of the student, G teacher heads for each, K key heads (in [H, Q, K]: keys), Q queries, S
keys, D head dimension; M queries and N keys of a tile.
"""

# mypy: allow-incomplete-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.kernels.attention.choose import KernelUnavailable
from headway.kernels.attention.slopes import Slopes, learned
from headway.kernels.maps import operands
from headway.kernels.maps.operands import Scores
from headway.kernels.triton import map_kernels as kernels
from headway.kernels.triton.attention_operands import Lowered, biases, common, heads, lowered, padded
from headway.kernels.triton.map_configs import BIAS, FORWARD, KEYS, QUERIES
from headway.kernels.triton.map_tiles import Model, Sizes
from headway.kernels.triton.tuning import Config, Space

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PART = 128
"""Columns of a gradient that a launch computes, at most."""


@torch.compiler.disable  # Triton compiles the kernels itself
def sums(teacher: Scores, student: Scores, loss: str, seen: operands.Seen, rows: Tensor | None) -> Tensor:
    """Sums of a loss over the rows that count, [B] in fp32: see `operands.Sums`.

    Scopes other than windows, and masks of parts of a sequence, are written out, bool [Q, S] for all heads. A student's
    bias gets a gradient as large as it is.

    Raises:
        KernelUnavailable: a dtype is not for these kernels.
    """
    _check("teacher", teacher)
    _check("student", student)
    slopes = student.bias if isinstance(student.bias, Slopes) else None
    ours = student.q, student.k, learned(student.bias), slopes, student.scale
    found: Tensor = _Sums.apply(*ours, *teacher, loss, _lowered(seen, rows, student))
    return found


def _check(whose: str, scores: Scores) -> None:
    dtype = scores.q.dtype
    if dtype not in DTYPES:
        rule = f"it takes fp32, bf16 and fp16, and q_{whose} is {dtype}"
        raise KernelUnavailable("triton", rule, "chunked")


def _lowered(seen: operands.Seen, rows: Tensor | None, student: Scores) -> Lowered:
    """The mask as kernels take it: also rows that do not count, and pairs, beside those that a scope allows."""
    found = lowered(seen.mask, student.q, student.k)
    said = found.seen
    if rows is not None:
        said = said._replace(counts=rows.contiguous().view(torch.uint8))
    if seen.pairs is not None:
        allowed_BQS = seen.pairs[:, 0].view(torch.uint8)
        if said.allowed is not None:
            scope_BQS = said.allowed if said.allowed_batch else said.allowed[:1]
            allowed_BQS = allowed_BQS & scope_BQS
        shape = len(student.q), student.q.shape[2], student.k.shape[2]
        allowed_BQS = allowed_BQS.expand(shape)
        strides = dict(zip(("batch", "query", "key"), allowed_BQS.stride(), strict=True))
        said = said._replace(allowed=allowed_BQS, **{f"allowed_{dim}": step for dim, step in strides.items()})
    return found._replace(seen=said)


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, bias, slopes, scale, q_t, k_t, scale_t, bias_t, loss, mask):
        student = Scores(q, k, scale, bias if slopes is None else slopes)
        with torch.cuda.device_of(q):
            values_BHQ, kept = _forward(_Call.of(Scores(q_t, k_t, scale_t, bias_t), student, loss, mask))
        ctx.save_for_backward(q, k, bias, q_t, k_t, *kept)
        ctx.described = slopes, scale, scale_t, bias_t, loss, mask
        return values_BHQ.sum((1, 2)) / q.shape[1]

    @staticmethod
    @once_differentiable
    def backward(ctx, d_sums_B):
        q, k, bias, q_t, k_t, *kept = ctx.saved_tensors
        slopes, scale, scale_t, bias_t, loss, mask = ctx.described
        student = Scores(q, k, scale, bias if slopes is None else slopes)
        with torch.cuda.device_of(q):
            call = _Call.of(Scores(q_t, k_t, scale_t, bias_t), student, loss, mask)
            upstream_B = (d_sums_B / q.shape[1]).contiguous()
            found = _backward(call, student, (*kept, upstream_B), ctx.needs_input_grad[:3])
        return *found, *[None] * 8


class _Call(NamedTuple):
    """What all kernels of a call share.

    Attributes:
        teacher, student, mask, sizes: as the kernels are given them.
        group: G.
        constants: what they are compiled for, beside `group` and tiles.
        key: what their tiles depend on.
        device: where they run.
    """

    teacher: Model
    student: Model
    mask: Lowered
    sizes: Sizes
    group: int
    constants: dict[str, Any]
    key: dict[str, int]
    device: torch.device

    @staticmethod
    def of(teacher: Scores, student: Scores, loss: str, mask: Lowered) -> _Call:
        batch, count, queries, width = student.q.shape
        theirs = teacher.q.shape[-1]
        itemsize = max(teacher.q.element_size(), student.q.element_size())
        at_once = {"W_T": _columns(theirs, itemsize), "W_S": _columns(width, itemsize)}
        widths = {"D_T": theirs, "D_S": width, **at_once}
        key = {"width": max(at_once.values()), "itemsize": itemsize}
        return _Call(
            _model(teacher),
            _model(student),
            mask,
            Sizes(batch, count, queries, student.k.shape[2]),
            teacher.q.shape[1] // count,
            {"LOSS": loss, "CAUSAL": mask.causal, "BY": common(*teacher[:2], *student[:2]), **widths},
            key,
            student.q.device,
        )

    @property
    def operands(self) -> tuple[Any, ...]:
        return self.teacher, self.student, self.mask.seen, self.mask.spans, self.sizes

    def config(self, space: Space) -> Config:
        """The configuration of a kernel of this call."""
        return space.choose(self.device, **self.key)

    def rows(self, count: int) -> Tensor:
        """Room for a number of every row of so many heads, fp32 [B, heads, Q]."""
        shape = self.sizes.batch, count, self.sizes.queries
        return torch.empty(shape, dtype=torch.float32, device=self.device)


def _columns(width: int, itemsize: int) -> int:
    """How many columns of a head are multiplied at once: of fp32, whose products are of vector units, fewer."""
    return min(64 if itemsize == 4 else 128, padded(width))


def _model(scores: Scores) -> Model:
    group = scores.q.shape[1] // scores.k.shape[1]
    return Model(heads(scores.q), heads(scores.k), biases(scores.bias), float(scores.scale), group)


def _forward(call: _Call) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Losses of rows [B, H, Q]; and for gradients log-sum-exps of teacher and student, centres [B, H, Q], and 1 / n
    [B, 1, Q], None for what the loss does not need."""
    size, loss = call.sizes, call.constants["LOSS"]
    config = call.config(FORWARD)
    programs = size.batch * size.heads * triton.cdiv(size.queries, config.tiles["M"])
    values = call.rows(size.heads)
    centres = call.rows(size.heads) if loss in ("js", "mse") else None
    shares = call.rows(1) if loss in ("mse", "scores") else None
    lse_t, lse_s = None, None
    if loss != "scores":
        lse_t, lse_s = call.rows(size.heads * call.group), call.rows(size.heads)
    if call.group == 1 and loss in ("kl", "reverse_kl"):
        given = *call.operands, lse_t, lse_s, values
        kernels.map_divergence_kernel[programs,](*given, **call.constants, **config.options)
    else:
        if lse_t is not None and lse_s is not None:
            _log_sums(call, call.teacher, lse_t, "T")
            _log_sums(call, call.student, lse_s, "S")
        given = *call.operands, lse_t, lse_s, values, centres, shares
        kernels.map_terms_kernel[programs,](*given, G=call.group, **call.constants, **config.options)
    return values, (lse_t, lse_s, values if loss == "reverse_kl" else centres, shares)


def _log_sums(call: _Call, model: Model, lse: Tensor, whose: str) -> None:
    """Write the log-sum-exps of a model's rows; `whose`: T or S, in the names of widths."""
    size, config = call.sizes._replace(heads=lse.shape[1]), call.config(FORWARD)
    constants = {key: call.constants[f"{key}_{whose}"] for key in "DW"}
    constants |= {key: call.constants[key] for key in ("CAUSAL", "BY")}
    programs = size.batch * size.heads * triton.cdiv(size.queries, config.tiles["M"])
    given = model, *call.mask[:2], size, lse
    kernels.map_log_sums_kernel[programs,](*given, **constants, **config.options)


def _backward(
    call: _Call, student: Scores, given: tuple[Tensor | None, ...], wanted: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the student's queries, keys and bias, those that are wanted; `given`: what the forward kept,
    and the gradient of a row's loss [B]."""
    size, (q, k) = call.sizes, student[:2]
    dq = dk = d_bias = None
    if wanted[0]:
        dq, config = torch.empty_like(q, memory_format=torch.contiguous_format), call.config(QUERIES)
        programs = size.batch * size.heads * triton.cdiv(size.queries, config.tiles["M"])
        _by_parts(kernels.map_queries_kernel, programs, call, given, (k, dq), config)
    if wanted[1]:
        dk, config = torch.empty_like(k, memory_format=torch.contiguous_format), call.config(KEYS)
        programs = size.batch * k.shape[1] * triton.cdiv(size.keys, config.tiles["N"])
        _by_parts(kernels.map_keys_kernel, programs, call, given, (q, dk), config)
    bias = learned(student.bias)
    if wanted[2] and bias is not None:
        wide = torch.empty(bias.shape, dtype=torch.float32, device=bias.device)
        config = call.config(BIAS)
        tiles = (triton.cdiv(size.queries, config.tiles["M"]), triton.cdiv(size.keys, config.tiles["N"]))
        into = call.teacher, call.student, call.mask.seen, size, *given, wide
        constants = {"G": call.group, **call.constants, **config.options}
        kernels.map_bias_kernel[size.heads * tiles[0] * tiles[1],](*into, **constants)
        d_bias = wide.to(bias.dtype)
    return dq, dk, d_bias


def _by_parts(
    kernel: Any,
    programs: int,
    call: _Call,
    given: tuple[Tensor | None, ...],
    pair: tuple[Tensor, Tensor],
    config: Config,
) -> None:
    """Write a gradient, the second of a pair, from products with the first; of wide heads a launch computes PART
    columns."""
    width = pair[0].shape[-1]
    constants = {"G": call.group, **call.constants, **config.options}
    whole = width <= constants["W_S"]
    for first in range(0, width, PART):
        columns, into = (heads(x[..., first : first + PART]) for x in pair)
        here = min(PART, width - first)
        own = *call.operands, *given, None if whole else columns, into
        kernel[programs,](*own, D_P=here, W_P=padded(here), **constants)
