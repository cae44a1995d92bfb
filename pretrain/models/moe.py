"""Mixture of experts: a router, experts, and what every token passes beside them.

Shapes: B batch, S sequence, N = B S tokens, X experts, E hidden size, F feed-forward size of an expert.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.kernels import grouped, random
from headway.kernels.experts import KERNELS, Pairs, Weights
from headway.pretrain import config
from headway.pretrain.errors import JobError
from headway.pretrain.models.layers import MLP, Keyed, Linear, Noise, narrowed
from headway.pretrain.models.routing import Side, route


class Router(Linear):
    """Logits of experts, in fp32 or wider whatever autocast says (Switch, section 2.4)."""

    def forward(self, x_BSE: Tensor) -> Tensor:
        wide, device = torch.promote_types(x_BSE.dtype, torch.float32), x_BSE.device.type
        with torch.autocast(device, enabled=False) if device != "meta" else nullcontext():
            return F.linear(x_BSE.to(wide), self.weight.to(wide))


class Jitter(Keyed):
    """x times uniform noise of 1 - p to 1 + p, by global coordinates; the identity where no noise is given."""

    def forward(self, x_BSE: Tensor, noise: Noise | None) -> Tensor:
        if noise is None or self.p == 0:
            return x_BSE
        length, width = x_BSE.shape[1:]
        columns = torch.arange(-(-width // 4), device=x_BSE.device)  # a call of Philox serves four columns
        words = random.philox(
            self.key(noise), columns, noise.places(length)[:, None], noise.slots_B[:, None, None], 0
        )
        u_BSE = torch.stack(words, -1).flatten(-2)[..., :width].to(x_BSE.dtype) * 2.0**-32
        return x_BSE * (1 + self.p * (2 * u_BSE - 1))


class Dispatcher(nn.Module):
    """Tokens to their experts and back. The socket that `parallel/` may replace.

    Raises:
        JobError: the kernel that was asked for cannot do it.
    """

    def __init__(self, model: config.Model) -> None:
        super().__init__()
        e = model.experts
        self.activation, self.request = model.activation, e.kernel
        self.bounded = e.capacity is not None or e.routing == "experts"
        if self.request == "batched" and not self.bounded:
            rule = "padded batches need model.experts.capacity, or routing by experts"
            raise JobError("model.experts.kernel", self.request, rule, "grouped")

    def forward(self, x_NE: Tensor, pairs: Pairs, weights: Weights) -> Tensor:
        """Sum over a token's experts of weight * expert(x), [N, E]."""
        kernel = KERNELS[self.choose(x_NE, weights)]
        return kernel(x_NE, pairs, weights, self.activation)

    def choose(self, x_NE: Tensor, weights: Weights) -> str:
        """Name of the kernel for these tensors."""
        rule = grouped.rule(x_NE, *weights.up_XFE.shape[1:])
        fallback = "batched" if self.bounded else "reference"
        if self.request == "grouped" and rule:
            raise JobError("model.experts.kernel", self.request, rule, fallback)
        if self.request != "auto":
            return self.request
        if rule:
            return fallback
        return "grouped"


class MoE(nn.Module):
    """Experts in place of a feed-forward layer.

    Weights of all experts are one tensor each: `up` and `gate` [X, F, E], `down` [X, E, F]. `shared` experts are one
    MLP of their joint width. `balance_bias` [X] moves by `rebalance`, not by gradients.
    """

    balance_bias: Tensor | None

    def __init__(self, model: config.Model) -> None:
        super().__init__()
        e = model.experts
        self.experts = e
        x, width, hidden = e.count, e.ffn or model.ffn_width, model.hidden

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape))

        self.jitter = Jitter(e.jitter)
        self.router = Router(hidden, x, bias=False)
        self.up, self.down = parameter(x, width, hidden), parameter(x, hidden, width)
        self.gate = parameter(x, width, hidden) if model.gated else None
        self.up_bias = parameter(x, width) if model.bias else None
        self.gate_bias = parameter(x, width) if model.bias and model.gated else None
        self.down_bias = parameter(x, hidden) if model.bias else None
        self.shared = MLP(model, e.shared * width) if e.shared else None
        self.dispatcher: nn.Module = Dispatcher(model)
        self.choose = route  # `parallel/` replaces it where only some columns of a row are here
        self.register_buffer("balance_bias", torch.zeros(x) if e.bias_rate else None)

    def forward(
        self,
        x_BSE: Tensor,
        noise: Noise | None,
        valid_BS: Tensor | None = None,
        length: int | None = None,
    ) -> tuple[Tensor, Side]:
        """Output [B, S, E] in the dtype of products, and what `routing.route` says of every row.

        Args:
            noise: of the router's jitter; None has none.
            valid_BS: bool, of the whole row; false for padding, which no routed expert computes; all tokens if not
                given.
            length: of the whole row, where only some of its columns are here.
        """
        if valid_BS is None:
            shape = x_BSE.shape[0], length or x_BSE.shape[1]
            valid_BS = torch.ones(shape, dtype=torch.bool, device=x_BSE.device)
        logits_BSX = self.router(self.jitter(x_BSE, noise))
        pairs, side = self.choose(logits_BSX, self.experts, valid_BS, self.balance_bias)
        x_BSE = narrowed(x_BSE)
        weights = Weights(self.up, self.down, self.gate, self.up_bias, self.down_bias, self.gate_bias)
        y_NE = self.dispatcher(x_BSE.flatten(0, 1), pairs, weights)
        y_BSE = y_NE.view_as(x_BSE)
        if self.shared is not None:
            y_BSE = y_BSE + self.shared(x_BSE)
        return y_BSE, side

    @torch.no_grad()
    def rebalance(self, load_X: Tensor) -> None:
        """Raise the bias of experts below the mean load and lower that of others, by `bias_rate` (Wang et al. 2024,
        algorithm 1).

        Args:
            load_X: pairs that each expert computed in the step, of the whole global batch.
        """
        if self.balance_bias is not None:
            self.balance_bias += self.experts.bias_rate * torch.sign(load_X.mean() - load_X)
