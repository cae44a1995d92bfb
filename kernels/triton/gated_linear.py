"""Gated linear attention, S_t = diag(a_t) S_{t-1} + k_t v_t^T and o_t = q_t^T S_t: `kernels.attention.linear.gated`.

As there, a chunk is halved again and again: keys of first halves meet queries of second ones by way of the border
between them, so that no exponent is above 0. All pairs of halves of a size are one product of whole tiles, of which
those of other pairs are dropped: six products of tensor cores, where PyTorch's version copies corners, and where blocks
on the diagonal would need the vector units (Yang et al. 2024a, section 4.3).

    totals      logarithms of gates summed from each chunk's start
    weights     products inside of chunks, decayed, [B, H, S, C]
    states      walks the chunks; from the right those of the backward
    outputs     weights v + enter q S; of the backward dv = weights^T d + leave k dS
    gradients   dq, dk and those of gates, which are what q dq - k dk sums to (appendix C)

The backward forms weights again: kept, they would be as much as a head of C dimensions. Borders are read for each of
the six sizes, from the cache of a multiprocessor that holds the tile. A program has some columns of its result, and
reads the operands of the chunk's products once for each block of these.

Shapes: B batch, H query heads, K key/value heads, S tokens, D head dimension, N chunks, C tokens of a chunk; in kernels
X dimensions of keys and Z of values.
"""

# Triton gives the arguments of kernels their types; only constants are marked.
# mypy: allow-incomplete-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.kernels.attention.dense import score_scale
from headway.kernels.attention.linear.gated import log_decay
from headway.kernels.attention.masks import Mask
from headway.kernels.triton import gated_kernels as kernels
from headway.kernels.triton.attention_operands import heads as heads_of
from headway.kernels.triton.attention_operands import of_samples
from headway.kernels.triton.state_tiles import (
    block,
    check,
    chunk_size,
    state_rows,
    wide_config,
)
from headway.kernels.triton.tuning import Config, Space


def _state_configs(target: str, keys: int, values: int, itemsize: int) -> list[Config]:
    if itemsize == 4:
        return [wide_config(target, X=keys, Z=values)]
    return [Config({"X": state_rows(target, keys), "Z": block(values, z)}, 4, 2) for z in (64, 32)]


def _output_configs(target: str, keys: int, values: int, itemsize: int) -> list[Config]:
    if itemsize == 4:
        return [wide_config(target, X=keys, Z=values)]
    return [Config({"X": block(keys, 64), "Z": block(values, z)}, 4, 2) for z in (64, 32)]


def _gradient_configs(target: str, keys: int, values: int, itemsize: int) -> list[Config]:
    if itemsize == 4:
        return [wide_config(target, X=keys, Z=values)]
    warps = 4 if target == "gfx942" else 8  # of 64 lanes there
    return [Config({"X": block(keys, x), "Z": block(values, 32)}, warps, 1) for x in (32, 16)]


def _weight_configs(target: str, keys: int, itemsize: int) -> list[Config]:
    if itemsize == 4:
        return [wide_config(target, X=keys)]
    columns = (32, 16) if target == "sm_80" else (64, 32)
    return [Config({"X": block(keys, x)}, 4, 1) for x in columns]


STATES = Space("gated_linear_states", _state_configs)
OUTPUTS = Space("gated_linear_outputs", _output_configs)
GRADIENTS = Space("gated_linear_gradients", _gradient_configs)
WEIGHTS = Space("gated_linear_weights", _weight_configs)
TOTALS = Space("gated_linear_totals", _weight_configs)


@torch.compiler.disable  # Triton compiles the kernels itself
def gated_linear(
    q_BHSD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    scale: float | None = None,
    *,
    decay: Tensor,
) -> Tensor:
    """As `gated.attention`, [B, H, S, D] like v.

    Args:
        mask: causal, with documents or without; a state begins at 0 with each document.
        scale: factor of the queries; 1 / sqrt(D) if None.
        decay: [B, H, S, D], before the sigmoid; PyTorch takes its logarithm.

    Raises:
        KernelUnavailable: a mask or dtypes that it does not take.
    """
    check("gated_linear", mask, q=q_BHSD, k=k_BKSD, v=v_BKSD)
    documents = of_samples(mask.documents, q_BHSD.shape[0])
    logs = log_decay(decay)
    out: Tensor = _GatedLinear.apply(q_BHSD, k_BKSD, v_BKSD, logs, documents, score_scale(scale, q_BHSD))
    return out


class _Call(NamedTuple):
    """What all kernels of a call share; `totals`: fp32 [B, H, S, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    totals: Tensor
    documents: Tensor | None
    scale: float

    @property
    def chunk(self) -> int:
        """C."""
        return chunk_size(self.q.dtype)

    @property
    def widths(self) -> tuple[int, int]:
        """Dimensions of keys and of values."""
        return self.k.shape[3], self.v.shape[3]

    @property
    def key(self) -> dict[str, int]:
        """What tiles depend on."""
        return {"keys": self.k.shape[3], "values": self.v.shape[3], "itemsize": self.v.element_size()}

    @property
    def places(self) -> tuple[int, int, int]:
        """Query heads, those that read a key head, tokens."""
        return self.q.shape[1], self.q.shape[1] // self.k.shape[1], self.q.shape[2]

    @property
    def chunks(self) -> int:
        """Of all heads."""
        return self.q.shape[0] * self.q.shape[1] * triton.cdiv(self.q.shape[2], self.chunk)

    def walk(self, y: Tensor, back: bool) -> Tensor:
        """States [B, H, N, D, D] that reach each chunk: of keys and values y, or from the right of queries and y."""
        config = STATES.choose(y.device, **self.key)
        keys, values = self.widths
        heads, _, length = self.places
        states = y.new_empty(y.shape[0], heads, triton.cdiv(length, self.chunk), keys, values)
        programs = y.shape[0] * heads * _blocks(keys, config, "X") * _blocks(values, config, "Z")
        given = heads_of(self.q if back else self.k), heads_of(y), self.totals, self.documents, states
        kernels.gated_linear_states_kernel[programs,](
            *given, self.scale, *self.places, keys, values, BACK=back, C=self.chunk, **config.options
        )
        return states

    def weights(self) -> Tensor:
        """Products inside of chunks, [B, H, S, C]."""
        weights = self.q.new_empty(*self.q.shape[:3], self.chunk)
        config = WEIGHTS.choose(self.q.device, keys=self.k.shape[3], itemsize=self.q.element_size())
        kernels.gated_linear_weights_kernel[self.chunks,](
            heads_of(self.q), heads_of(self.k), self.totals, self.documents, weights, self.scale, *self.places,
            self.k.shape[3], LEVELS=self.chunk.bit_length() - 1, C=self.chunk, **config.options,
        )  # fmt: skip
        return weights

    def outputs(self, y: Tensor, states: Tensor, back: bool) -> Tensor:
        """Outputs from values y, or gradients of each query head's values from those of outputs."""
        keys, values = self.widths
        result = y.new_empty(*self.q.shape[:3], values)
        config = OUTPUTS.choose(y.device, **self.key)
        given = heads_of(self.k if back else self.q), heads_of(y), self.totals, self.documents, self.weights()
        kernels.gated_linear_outputs_kernel[self.chunks * _blocks(values, config, "Z"),](
            *given, states, result, self.scale, *self.places, keys, values,
            BACK=back, C=self.chunk, **config.options,
        )  # fmt: skip
        return result

    def gradients(self, d: Tensor, states: Tensor, d_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of queries, of each query head's keys, and of logarithms of gates."""
        keys, values = self.widths
        dq, dk = (torch.empty_like(self.q, memory_format=torch.contiguous_format) for _ in range(2))
        d_logs = torch.empty_like(self.totals)
        config = GRADIENTS.choose(d.device, **self.key)
        given = *map(heads_of, (self.q, self.k, self.v, d)), self.totals, self.documents, states, d_states
        kernels.gated_linear_gradients_kernel[self.chunks * _blocks(keys, config, "X"),](
            *given, dq, dk, d_logs, self.scale, *self.places, keys, values,
            LEVELS=self.chunk.bit_length() - 1, C=self.chunk, **config.options,
        )  # fmt: skip
        return dq, dk, d_logs


def _blocks(width: int, config: Config, tile: str) -> int:
    return triton.cdiv(width, config.tiles[tile])


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, logs, documents, scale):
        logs = logs.contiguous()
        totals = torch.empty_like(logs)
        config = TOTALS.choose(q.device, keys=q.shape[3], itemsize=q.element_size())
        call = _Call(q, k, v, totals, documents, scale)
        with torch.cuda.device_of(q):
            kernels.gated_linear_totals_kernel[call.chunks * _blocks(q.shape[3], config, "X"),](
                logs, totals, q.shape[2], q.shape[3], C=call.chunk, **config.options
            )
            states = call.walk(v, False)
            out = call.outputs(v, states, False)
        ctx.save_for_backward(q, k, v, totals, documents, states)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q, k, v, totals, documents, states = ctx.saved_tensors
        call = _Call(q, k, v, totals, documents, ctx.scale)
        with torch.cuda.device_of(q):
            d_states = call.walk(d_out, True)
            dq, dk, d_logs = call.gradients(d_out, states, d_states)
            dv = call.outputs(d_out, d_states, True)
        return dq, _of_key_heads(dk, k), _of_key_heads(dv, v), d_logs, None, None


def _of_key_heads(d_BHSD: Tensor, like_BKSD: Tensor) -> Tensor:
    """Summed over the query heads that read a head of keys; gates are the query heads' own."""
    heads = like_BKSD.shape[1]
    if d_BHSD.shape[1] == heads:
        return d_BHSD
    return d_BHSD.unflatten(1, (heads, -1)).sum(2, dtype=torch.float32).to(d_BHSD.dtype)
