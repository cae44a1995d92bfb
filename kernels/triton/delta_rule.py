"""The gated delta rule, S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T: `kernels.attention.linear.delta`.

With A the products of a chunk's keys and earlier keys, decayed, its tokens write W = T b (v - enter k S), T the inverse
of the unit triangular 1 + b A (the WY form, Yang et al. 2024b, section 3.2). T is made of its diagonal blocks, of
twice the size every time: the corner of [[X, 0], [L, Y]]^-1 is -Y^-1 L X^-1, and all pairs of blocks are two products
of whole tiles. PyTorch's version has a solver that walks rows, and a dozen copies for each segment.

    systems     T and weights q k^T, decayed, [B, H, S, C]
    states      walks the chunks: states and what tokens write
    outputs     weights W + enter q S
    back        walks from the right: gradients of states and of b (v - enter k S)
    gradients   all others, of a chunk

The backward forms T and weights again: kept, they would be as much as two heads of C dimensions. A walk has all
dimensions of keys, and reads q and k once for every block of v's columns; a program of gradients has a chunk, and reads
what belongs to values once for every block of dimensions of keys.

Shapes: B batch, H heads, S tokens, D head dimension, N chunks, C tokens of a chunk; in kernels X dimensions of keys and
Z of values.
"""

# Triton gives the arguments of kernels their types; only constants are marked.
# mypy: allow-incomplete-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.kernels.attention.linear.delta import WIDEST
from headway.kernels.attention.masks import Mask
from headway.kernels.triton import delta_kernels as kernels
from headway.kernels.triton.attention_operands import heads as heads_of
from headway.kernels.triton.attention_operands import of_samples
from headway.kernels.triton.state_tiles import (
    block,
    check,
    chunk_size,
    wide_config,
)
from headway.kernels.triton.tuning import Config, Space


def _walk_configs(target: str, keys: int, values: int, itemsize: int) -> list[Config]:
    whole = block(keys, WIDEST)
    if itemsize == 4 and target != "gfx942":
        at_once = block(keys, 64 if keys <= 64 else 32)
        return [Config({"X": whole, "W": at_once, "Z": block(values, 16)}, 8, 1, 255)]
    warps = 8 if keys > 64 and target != "gfx942" else 4  # of 64 lanes there
    stages = 2 if keys > 128 and target in ("sm_90a", "sm_100a") else 1  # one spills there, two elsewhere
    columns = (32, 16) if keys <= 64 and itemsize == 2 else (16,)  # wider ones spill
    return [Config({"X": whole, "W": whole, "Z": block(values, z)}, warps, stages) for z in columns]


def _output_configs(target: str, keys: int, values: int, itemsize: int) -> list[Config]:
    if itemsize == 4:
        return [wide_config(target, X=keys, Z=values)]
    return [Config({"X": block(keys, x), "Z": block(values, x)}, 4, 2) for x in (64, 32)]


def _system_configs(target: str, keys: int, itemsize: int) -> list[Config]:
    if itemsize == 4:
        return [Config({"X": 64}, 4, 1) if keys > 64 else wide_config(target, X=keys)]  # of 16 tokens, and 32
    return [Config({"X": block(keys, x)}, 4, 1) for x in (64, 32)]


def _gradient_configs(target: str, keys: int, values: int, itemsize: int) -> list[Config]:
    if itemsize == 4:
        return [wide_config(target, X=keys, Z=values)]
    warps = 4 if target == "gfx942" else 8  # of 64 lanes there
    return [Config({"X": block(keys, x), "Z": block(values, 32)}, warps, 1) for x in (32, 16)]


SYSTEMS = Space("delta_rule_systems", _system_configs)
STATES = Space("delta_rule_states", _walk_configs)
OUTPUTS = Space("delta_rule_outputs", _output_configs)
BACK = Space("delta_rule_back", _walk_configs)
GRADIENTS = Space("delta_rule_gradients", _gradient_configs)


@torch.compiler.disable  # Triton compiles the kernels itself
def delta_rule(
    q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Mask, *, beta_BHS: Tensor, log_decay_BHS: Tensor
) -> Tensor:
    """o_t = q_t^T S_t, [B, H, S, D] like v.

    Args:
        q_BHSD, k_BHSD: of unit norm, queries scaled; of v's dtype.
        mask: causal, with documents or without; a state begins at 0 with each document.
        beta_BHS: b, the fraction by which a token corrects what its key finds; between 0 and 1.
        log_decay_BHS: logarithm of a; 0 at most.

    Raises:
        KernelUnavailable: a mask or dtypes that it does not take.
        ValueError: keys are wider than WIDEST.
    """
    check("delta_rule", mask, q=q_BHSD, k=k_BHSD, v=v_BHSD)
    if k_BHSD.shape[3] > WIDEST:
        raise ValueError(f"head dimension {k_BHSD.shape[3]}: at most {WIDEST} fit into a program")
    documents = of_samples(mask.documents, q_BHSD.shape[0])
    numbers = beta_BHS.float(), log_decay_BHS.float()
    out: Tensor = _DeltaRule.apply(q_BHSD, k_BHSD, v_BHSD, *numbers, documents)
    return out


class _Call(NamedTuple):
    """What all kernels of a call share."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log: Tensor
    documents: Tensor | None

    @property
    def chunk(self) -> int:
        """C: half as many where keys are wide and of fp32, as a walk has all of their dimensions in registers."""
        size = chunk_size(self.q.dtype)
        return size // 2 if self.q.dtype == torch.float32 and self.k.shape[3] > 64 else size

    @property
    def key(self) -> dict[str, int]:
        """What tiles depend on."""
        return {"keys": self.k.shape[3], "values": self.v.shape[3], "itemsize": self.v.element_size()}

    @property
    def numbers(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.beta, self.log, self.documents

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Heads, tokens, dimensions of keys and of values."""
        return self.q.shape[1], self.q.shape[2], self.k.shape[3], self.v.shape[3]

    @property
    def chunks(self) -> int:
        """Of all heads."""
        return self.q.shape[0] * self.q.shape[1] * triton.cdiv(self.q.shape[2], self.chunk)

    def systems(self) -> tuple[Tensor, Tensor]:
        """T and weights, [B, H, S, C]."""
        inverse, weights = (self.q.new_empty(*self.q.shape[:3], self.chunk) for _ in range(2))
        config = SYSTEMS.choose(self.q.device, keys=self.k.shape[3], itemsize=self.q.element_size())
        kernels.delta_rule_systems_kernel[self.chunks,](
            heads_of(self.q), heads_of(self.k), *self.numbers, inverse, weights, *self.sizes[:3],
            LEVELS=self.chunk.bit_length() - 1, C=self.chunk, **config.options,
        )  # fmt: skip
        return inverse, weights

    def states(self) -> Tensor:
        """Room for states [B, H, N, D, D]."""
        heads, length, keys, values = self.sizes
        return self.v.new_empty(self.v.shape[0], heads, triton.cdiv(length, self.chunk), keys, values)

    def walk(self, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """States that reach each chunk, and what tokens write, [B, H, S, D]."""
        states, written = self.states(), torch.empty_like(self.v, memory_format=torch.contiguous_format)
        config = STATES.choose(self.v.device, **self.key)
        programs = self.v.shape[0] * self.sizes[0] * triton.cdiv(self.sizes[3], config.tiles["Z"])
        given = heads_of(self.k), heads_of(self.v), *self.numbers, inverse, states, written
        kernels.delta_rule_states_kernel[programs,](*given, *self.sizes, C=self.chunk, **config.options)
        return states, written

    def outputs(self, weights: Tensor, states: Tensor, written: Tensor) -> Tensor:
        out = torch.empty_like(written)
        config = OUTPUTS.choose(self.v.device, **self.key)
        programs = self.chunks * triton.cdiv(self.sizes[3], config.tiles["Z"])
        given = heads_of(self.q), self.log, self.documents, weights, states, heads_of(written), out
        kernels.delta_rule_outputs_kernel[programs,](*given, *self.sizes, C=self.chunk, **config.options)
        return out

    def back(self, d: Tensor, inverse: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the states that leave each chunk, and of b (v - enter k S)."""
        d_states, d_right = self.states(), torch.empty_like(self.v, memory_format=torch.contiguous_format)
        config = BACK.choose(self.v.device, **self.key)
        programs = self.v.shape[0] * self.sizes[0] * triton.cdiv(self.sizes[3], config.tiles["Z"])
        given = *map(heads_of, (self.q, self.k, d)), *self.numbers, inverse, weights, d_states, d_right
        kernels.delta_rule_back_kernel[programs,](*given, *self.sizes, C=self.chunk, **config.options)
        return d_states, d_right

    def gradients(self, d: Tensor, weights: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        """Of q, k, v, b and logarithms of a; `kept`: states, what tokens write, and gradients of the two."""
        given = *map(heads_of, (self.q, self.k, self.v, d)), *self.numbers, weights, *kept
        found = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in self[:5]]
        config = GRADIENTS.choose(self.v.device, **self.key)
        kernels.delta_rule_gradients_kernel[self.chunks,](
            *given, *found, *self.sizes, C=self.chunk, **config.options
        )
        return tuple(found)


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, beta, log, documents):
        call = _Call(q, k, v, beta.contiguous(), log.contiguous(), documents)
        with torch.cuda.device_of(q):
            inverse, weights = call.systems()
            states, written = call.walk(inverse)
            out = call.outputs(weights, states, written)
        ctx.save_for_backward(*call, states, written)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        *given, states, written = ctx.saved_tensors
        call = _Call(*given)
        with torch.cuda.device_of(d_out):
            inverse, weights = call.systems()
            d_states, d_right = call.back(d_out, inverse, weights)
            found = call.gradients(d_out, weights, states, written, d_states, d_right)
        return *found, None
