"""Layers: plain modules that hold parameters and call kernels. `init.initialise` fills them.

Shapes: B batch, S sequence, E hidden size, F feed-forward size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from headway.kernels import glu, norm, random
from headway.kernels.dropout import dropout
from headway.kernels.precision import product_dtype
from headway.pretrain import config
from headway.pretrain.models.spectral import SpectralLinear


class Noise(NamedTuple):
    """What dropout depends on, in one forward of one (micro-)batch.

    Attributes:
        key: int64, 0-dim: a key of (seed, step), see `headway.kernels.random`.
        slots_B: int64, each row's place in the global batch.
        positions_S: int64, each column's place in the sequence; 0, 1, ... if None.
        step: int64, 0-dim: the optimizer step, for what changes once in many of them.
    """

    key: Tensor
    slots_B: Tensor
    positions_S: Tensor | None = None
    step: Tensor | None = None

    @classmethod
    def at(cls, seed: int, step: int, slots_B: Tensor, positions_S: Tensor | None = None) -> Noise:
        """Noise of optimizer step `step`, on the slots' device."""
        key = torch.tensor(random.key(seed, "dropout", step), device=slots_B.device)
        return cls(key, slots_B, positions_S, torch.tensor(step, device=slots_B.device))

    def places(self, length: int) -> Tensor:
        """Positions of the columns, int64 [S]: the first so many, where the others are not computed."""
        if self.positions_S is not None:
            return self.positions_S[:length]
        return torch.arange(length, device=self.key.device)

    def over(self, positions_S: Tensor) -> Noise:
        """The same, for columns at these places."""
        return self._replace(positions_S=positions_S)

    def again(self, times: int) -> Noise:
        """Noise of a module's next use in the same forward: blocks that share weights do not share dropout."""
        return self if times == 0 else self._replace(key=self.key ^ random.key(0, "again", times))


class Linear(nn.Linear):
    """x W^T + b. Not initialised here: initial weights depend on their canonical names."""

    def reset_parameters(self) -> None: ...


def build_linear(model: config.Model, inputs: int, outputs: int) -> nn.Linear:
    """A linear layer of a block, as the config wants it."""
    return (SpectralLinear if model.spectral else Linear)(inputs, outputs, model.bias)


def matrix(layer: nn.Linear) -> Tensor:
    """What a linear layer multiplies by, [outputs, inputs]."""
    return layer.matrix() if isinstance(layer, SpectralLinear) else layer.weight


class Embedding(nn.Embedding):
    """Rows of a table. Not initialised here, as Linear."""

    def reset_parameters(self) -> None: ...


class Summed(NamedTuple):
    """A residual stream with what a sub-layer adds, `total`, and what a norm makes of it."""

    normed: Tensor
    total: Tensor

    @classmethod
    def same(cls, x: Tensor) -> Summed:
        """A stream that is read as it is."""
        return cls(x, x)


class LayerNorm(nn.Module):
    """LayerNorm with statistics in fp32 or wider; returns the input's dtype. See `summed`."""

    def __init__(self, size: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if bias else None

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor | Summed:
        found = Summed(*norm.of_sum(x, added, self.weight, self.bias, self.eps, centred=True))
        return found.normed if added is None else found


class RMSNorm(nn.Module):
    """RMSNorm with statistics in fp32 or wider; returns the input's dtype. See `summed`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor | Summed:
        found = Summed(*norm.of_sum(x, added, self.weight, None, self.eps, centred=False))
        return found.normed if added is None else found


class Affine(nn.Module):
    """x * weight + bias, a norm without statistics: NoNorm (Sun et al. 2020, section 3.3)."""

    def __init__(self, size: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.weight
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def build_norm(model: config.Model, size: int | None = None) -> nn.Module:
    """The norm that the config names, of `size` features (the residual stream's if not given)."""
    size = size or model.hidden
    if model.norm == "none":
        return nn.Identity()
    if model.norm == "affine":
        return Affine(size, model.bias)
    return (
        RMSNorm(size, model.norm_eps)
        if model.norm == "rmsnorm"
        else LayerNorm(size, model.norm_eps, model.bias)
    )


def summed(layer: nn.Module, x: Tensor, added: Tensor | None) -> Summed:
    """The norm `layer` of x + added and that sum, in one pass over memory where there is a kernel for it."""
    if added is not None and isinstance(layer, LayerNorm | RMSNorm):
        found: Summed = layer(x, added)
        return found
    total = x if added is None else x + added
    return Summed(layer(total), total)


class Keyed(nn.Module):
    """What draws by global coordinates in training, with chance or size p.

    `salt` is the key of the module's canonical name, set by `init.initialise`. It is a tensor, not a number, so
    that compiled blocks differ in inputs only and share one graph.
    """

    salt: Tensor

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.register_buffer("salt", torch.zeros((), dtype=torch.int64), persistent=False)

    def key(self, noise: Noise) -> Tensor:
        """Key of this module at this step: both are hashes, so their xor names the pair."""
        return noise.key ^ self.salt


class Dropout(Keyed):
    """Dropout by global coordinates; the identity where p is 0 or no noise is given."""

    def drops(self, noise: Noise | None) -> bool:
        """Whether it is anything but the identity."""
        return noise is not None and self.p > 0

    def forward(self, x_BSE: Tensor, noise: Noise | None, residual_BSE: Tensor | None = None) -> Tensor:
        """`residual_BSE`: is added to what stays."""
        if noise is None or self.p == 0:
            return x_BSE if residual_BSE is None else residual_BSE + x_BSE
        coordinates = (noise.slots_B[:, None], noise.places(x_BSE.shape[1])[None], 0)
        return dropout(x_BSE, self.p, self.key(noise), coordinates, residual_BSE)


class StochasticDepth(Keyed):
    """Leaves out what a sub-layer adds, for whole samples, and scales what stays (Huang et al. 2016).

    The choice is a function of the step, the module's name and the sample's slot; without noise nothing is left out.
    """

    def forward(self, x_BSE: Tensor, noise: Noise | None) -> Tensor:
        if noise is None or self.p == 0:
            return x_BSE
        kept_B = random.uniform(self.key(noise), noise.slots_B) >= self.p
        return torch.where(kept_B[:, None, None], x_BSE / (1 - self.p), 0)


class MLP(nn.Module):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) for gated activations."""

    def __init__(self, model: config.Model, width: int | None = None) -> None:
        """`width`: of the hidden layer; the model's feed-forward width if not given."""
        super().__init__()
        width = width or model.ffn_width
        self.activation = model.activation
        self.gate = build_linear(model, model.hidden, width) if model.gated else None
        self.up = build_linear(model, model.hidden, width)
        self.down = build_linear(model, width, model.hidden)

    def forward(self, x_BSE: Tensor) -> Tensor:
        x_BSE = narrowed(x_BSE)
        if self.gate is not None:
            h_BSF = glu.gated(self.activation, self.gate(x_BSE), self.up(x_BSE))
        else:
            h_BSF = glu.PLAIN[self.activation](self.up(x_BSE))
        down: Tensor = self.down(h_BSF)
        return down


def narrowed(x: Tensor) -> Tensor:
    """x in the dtype of matrix products: cast once, where autocast would cast for every product."""
    return x.to(product_dtype(x))
