"""Map distillation by Triton kernels: what `kernels.map_distillation` computes, on GPUs, in O(S) memory.

The forward keeps log-sum-exps of the rows and what the loss makes of them; the backward computes scores again, tile by
tile, once for queries and once for keys. `map_kernels` has the mathematics.

Shapes: B batch, H query heads of the student, G teacher heads for each, K key heads (in [H, Q, K]: keys), Q queries, S
keys, D head dimension; M queries and N keys of a tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.kernels.attention.choose import KernelUnavailable
from headway.kernels.attention.masks import lower
from headway.kernels.attention.slopes import Distances, Fixed, Slopes, learned
from headway.kernels.maps import operands
from headway.kernels.maps.operands import Scores
from headway.kernels.triton import map_kernels as kernels
from headway.kernels.triton.map_tiles import Biases, Heads, Model, Seen, Sizes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 512
"""Head dimension at most, and half of what a student head's teacher heads have together: more does not fit into a
multiprocessor's shared memory."""


@torch.compiler.disable  # Triton compiles the kernels itself
def sums(teacher: Scores, student: Scores, loss: str, seen: operands.Seen, rows: Tensor | None) -> Tensor:
    """Sums of a loss over the rows that count, [B] in fp32: see `operands.Sums`.

    Scopes other than windows, and masks of parts of a sequence, are written out, bool [Q, S] for all heads. A student's
    bias gets a gradient as large as it is.

    Raises:
        KernelUnavailable: a dtype or a head dimension is not for these kernels.
    """
    _check("teacher", teacher)
    _check("student", student)
    slopes = student.bias if isinstance(student.bias, Slopes) else None
    ours = student.q, student.k, learned(student.bias), slopes, student.scale
    found: Tensor = _Sums.apply(*ours, *teacher, loss, _lowered(seen, rows, student))
    return found


def _check(whose: str, scores: Scores) -> None:
    dtype = scores.q.dtype
    rule = None
    if dtype not in DTYPES:
        rule = f"it takes fp32, bf16 and fp16, and q_{whose} is {dtype}"
    elif dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        rule = f"Triton's interpreter computes bf16 wrongly, and q_{whose} is {dtype}"
    if rule is not None:
        raise KernelUnavailable("triton", rule, "chunked")


def _width(teacher: Scores, student: Scores) -> int:
    """By how wide a head the tiles are chosen: the student's, or the teacher's, whose tiles are G at once."""
    theirs, ours = (padded(scores.q.shape[-1]) for scores in (teacher, student))
    group = teacher.q.shape[1] // student.q.shape[1]
    width = max(ours, theirs, theirs * triton.next_power_of_2(group) // 2)
    if width > WIDEST:
        rule = f"{group} teacher heads for each of the student's, of dimension {theirs}, and {ours} of the student's"
        raise KernelUnavailable("triton", f"it takes widths up to {WIDEST}, not {rule}", "chunked")
    return width


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, bias, slopes, scale, q_t, k_t, scale_t, bias_t, loss, mask):
        student = Scores(q, k, scale, bias if slopes is None else slopes)
        with torch.cuda.device_of(q):
            values_BHQ, *kept = _forward(_Call.of(Scores(q_t, k_t, scale_t, bias_t), student, loss, mask))
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


class _Lowered(NamedTuple):
    """A mask as kernels take it."""

    seen: Seen
    causal: bool


class _Call(NamedTuple):
    """What all kernels of a call share.

    Attributes:
        teacher, student, seen, sizes: as the kernels are given them.
        group: G.
        constants: what they are compiled for, beside `group` and tiles.
        itemsize, width: what `blocks` asks for.
    """

    teacher: Model
    student: Model
    seen: Seen
    sizes: Sizes
    group: int
    constants: dict[str, Any]
    itemsize: int
    width: int

    @staticmethod
    def of(teacher: Scores, student: Scores, loss: str, mask: _Lowered) -> _Call:
        batch, heads, queries, width = student.q.shape
        theirs = teacher.q.shape[-1]
        constants = {
            "LOSS": loss,
            "CAUSAL": mask.causal,
            "D_T": theirs,
            "W_T": padded(theirs),
            "D_S": width,
            "W_S": padded(width),
        }
        sizes = Sizes(batch, heads, queries, student.k.shape[2])
        group = teacher.q.shape[1] // heads
        itemsize = max(teacher.q.element_size(), student.q.element_size())
        models = _model(teacher), _model(student)
        return _Call(*models, mask.seen, sizes, group, constants, itemsize, _width(teacher, student))

    @property
    def operands(self) -> tuple[Model, Model, Seen, Sizes]:
        return self.teacher, self.student, self.seen, self.sizes

    def rows(self, heads: int) -> Tensor:
        """Room for a number of every row of so many heads, fp32 [B, heads, Q]."""
        data: Tensor = self.student.q.data
        return data.new_empty(self.sizes.batch, heads, self.sizes.queries, dtype=torch.float32)


def _forward(call: _Call) -> tuple[Tensor, ...]:
    """Losses of rows [B, H, Q], log-sum-exps of teacher and student, centres [B, H, Q], and 1 / n [B, 1, Q]; where a
    loss needs no such, what stands there is never read."""
    size, loss = call.sizes, call.constants["LOSS"]
    tiles = blocks(call.itemsize, call.width)
    programs = size.batch * size.heads * triton.cdiv(size.queries, tiles["M"])
    values, lse_s = call.rows(size.heads), call.rows(size.heads)
    lse_t = call.rows(size.heads * call.group)
    if call.group == 1 and loss in ("kl", "reverse_kl"):
        found = lse_t, lse_s, values
        kernels.divergence_kernel[programs,](*call.operands, *found, **call.constants, **tiles)
        return values, lse_t, lse_s, values, values
    if loss != "scores":
        _log_sums(call, call.teacher, size.heads * call.group, lse_t, "T")
        _log_sums(call, call.student, size.heads, lse_s, "S")
    centres, shares = call.rows(size.heads), call.rows(1)
    written = lse_t, lse_s, values, centres, shares
    kernels.terms_kernel[programs,](*call.operands, *written, G=call.group, **call.constants, **tiles)
    return values, lse_t, lse_s, centres, shares


def _log_sums(call: _Call, model: Model, heads: int, lse: Tensor, whose: str) -> None:
    """Write the log-sum-exps of a model's rows; `whose`: T or S, in the names of widths."""
    size, tiles = call.sizes._replace(heads=heads), blocks(call.itemsize, call.width)
    constants = {key: call.constants[name] for key, name in (("D", f"D_{whose}"), ("W", f"W_{whose}"))}
    programs = size.batch * heads * triton.cdiv(size.queries, tiles["M"])
    given = model, call.seen, size, lse
    kernels.log_sums_kernel[programs,](*given, CAUSAL=call.constants["CAUSAL"], **constants, **tiles)


def _backward(
    call: _Call, student: Scores, given: tuple[Tensor, ...], wanted: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the student's queries, keys and bias, those that are wanted; `given`: what the forward gave after
    the losses, and the gradient of a row's loss [B]."""
    size, constants = call.sizes, {"G": call.group, **call.constants}
    tiles, key_tiles = (blocks(call.itemsize, call.width, keys) for keys in (False, True))
    dq = dk = d_bias = None
    if wanted[0]:
        dq = torch.empty_like(student.q, memory_format=torch.contiguous_format)
        programs = size.batch * size.heads * triton.cdiv(size.queries, tiles["M"])
        kernels.query_gradient_kernel[programs,](*call.operands, *given, _heads(dq), **constants, **tiles)
    if wanted[1]:
        dk = torch.empty_like(student.k, memory_format=torch.contiguous_format)
        programs = size.batch * student.k.shape[1] * triton.cdiv(size.keys, key_tiles["N"])
        kernels.key_gradient_kernel[programs,](*call.operands, *given, _heads(dk), **constants, **key_tiles)
    bias = learned(student.bias)
    if wanted[2] and bias is not None:
        wide = torch.empty(bias.shape, dtype=torch.float32, device=bias.device)
        programs = size.heads * triton.cdiv(size.queries, tiles["M"]) * triton.cdiv(size.keys, tiles["N"])
        kernels.bias_gradient_kernel[programs,](*call.operands, *given, wide, **constants, **tiles)
        d_bias = wide.to(bias.dtype)
    return dq, dk, d_bias


# -- operands, as kernels take them --------------------------------------------------------------------------------


def _model(scores: Scores) -> Model:
    group = scores.q.shape[1] // scores.k.shape[1]
    return Model(_heads(scores.q), _heads(scores.k), _biases(scores.bias), float(scores.scale), group)


def _heads(x_BHSD: Tensor) -> Heads:
    x_BHSD = x_BHSD if x_BHSD.stride(-1) == 1 else x_BHSD.contiguous()
    return Heads(x_BHSD, *x_BHSD.stride()[:3])


def _biases(bias: Fixed | None) -> Biases:
    if isinstance(bias, Distances):  # of whole sequences: a tensor [H, Q, K] with a stride of -1
        table = bias.table.contiguous()
        return Biases(table.view(-1)[bias.zero :], table.shape[1], -1, 1, None, None, None)
    if bias is None:
        return Biases(None, 0, 0, 0, None, None, None)
    if isinstance(bias, Slopes):
        return Biases(None, 0, 0, 0, *(x.contiguous() for x in bias))
    head, query, key = bias.stride()
    return Biases(bias, head, query, key, None, None, None)


def _lowered(seen: operands.Seen, rows: Tensor | None, student: Scores) -> _Lowered:
    """The mask: conditions that kernels check tile by tile, and a tensor of what they do not know."""
    (batch, _, queries, _), keys = student.q.shape, student.k.shape[2]
    mask, pairs = seen
    if mask.shift or (mask.scope is not None and mask.window is None):
        places = mask._replace(documents=None, key_documents=None)
        written = lower(places, queries, keys, student.q.device)
        if written is not None:
            pairs = written if pairs is None else pairs & written
        mask = mask._replace(causal=False, prefix=None, scope=None)
    theirs = mask.documents if mask.key_documents is None else mask.key_documents
    described = Seen(
        counts=None if rows is None else rows.contiguous().view(torch.uint8),
        documents=_of_samples(mask.documents, batch),
        key_documents=_of_samples(theirs, batch),
        prefix=_of_samples(mask.prefix, batch),
        window=mask.window,
        allowed=None, allowed_batch=0, allowed_query=0, allowed_key=0,
    )  # fmt: skip
    if pairs is not None:
        allowed = pairs[:, 0].expand(batch, queries, keys).view(torch.uint8)
        sample, query, key = allowed.stride()
        described = described._replace(
            allowed=allowed, allowed_batch=sample, allowed_query=query, allowed_key=key
        )
    return _Lowered(described, mask.causal)


def _of_samples(x: Tensor | None, batch: int) -> Tensor | None:
    """Numbers of documents or places for every sample; 32 bits hold them, and take half of the registers."""
    return None if x is None else x.expand(batch, *x.shape[1:]).to(torch.int32).contiguous()


def padded(width: int) -> int:
    """The power of two, at least 16 as products of tiles demand, that holds a head dimension."""
    return max(16, triton.next_power_of_2(width))


_BLOCKS = {
    2: {128: (64, 32, 4, 2), 256: (32, 32, 4, 2), 512: (16, 16, 4, 1)},
    4: {64: (32, 32, 4, 2), 128: (32, 32, 4, 1), 512: (16, 16, 4, 1)},
}
"""By the bytes of a number and the width at most: queries (or keys) of a program, keys (or queries) that it takes at
once, warps, stages. Chosen so that kernels of bf16 compiled for sm_80, sm_90a and gfx942 spill four registers at most
at widths of 64 and 128, and take less than 99 KiB of shared memory, which all GPUs since sm_80 have; products of fp32
use no tensor cores, and take more registers. They are not tuned by time."""


def blocks(itemsize: int, width: int, keys: bool = False) -> dict[str, int]:
    """M, N and options of compilation; `keys`: for the kernel whose programs own keys."""
    row = _BLOCKS[itemsize]
    owned, walked, warps, stages = row[min(most for most in row if most >= width)]
    m, n = (walked, owned) if keys else (owned, walked)
    return {"M": m, "N": n, "num_warps": warps, "num_stages": stages}
