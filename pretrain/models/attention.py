"""Attention of a block: projections, QK-norm, positions, and the core that mixes tokens.

Shapes: B batch, S sequence, M encoder's sequence, E hidden size, H query heads, K key/value heads, D head dimension.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headway.kernels.attention.choose import ANYWHERE, KernelUnavailable, choose
from headway.kernels.attention.content.span import spans
from headway.kernels.attention.dense import WeightDropout, score_scale
from headway.kernels.attention.draw import Draw
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.registry import Mechanism, Shape, mechanism
from headway.kernels.attention.reinforce import Drawn
from headway.kernels.attention.scores import Extras
from headway.kernels.attention.slopes import Bias, Slopes, part_of
from headway.kernels.rotary import Rotation, rotate_both
from headway.pretrain import config
from headway.pretrain.errors import JobError
from headway.pretrain.models.layers import Dropout, Noise, RMSNorm, build_linear, narrowed
from headway.pretrain.models.seat import Seat


class Core(nn.Module):
    """Heads in, heads out. The socket that `parallel/` may replace."""

    def __init__(self, attention: config.Attention, word: str, layer: int = 0) -> None:
        super().__init__()
        self.row, self.request, self.scale = mechanism(word), attention.kernel, attention.scale
        self.settings = attention.settings(layer, self.row.settings)
        try:
            choose(word, self.request, dropout=attention.dropout > 0, device=ANYWHERE)
        except KernelUnavailable as e:
            raise JobError("model.attention.kernel", e.value, e.rule, e.nearest) from None

    def forward(
        self,
        q_BHSD: Tensor,
        k_BKMD: Tensor,
        v_BKMD: Tensor,
        mask: Mask,
        dropout: WeightDropout | None,
        bias_HSM: Bias | None = None,
        own: Extras | None = None,
    ) -> Tensor:
        """Returns [B, H, S, D]; `own` are the mechanism's parameters and gates, by name."""
        assert mask.split is None, "this core needs all columns of a sequence"
        kernel = choose(
            self.row,
            self.request,
            dropout=dropout is not None,
            bias=bias_HSM is not None,
            device=q_BHSD.device.type,
            dtype=q_BHSD.dtype,
            compiled=torch.compiler.is_compiling(),
            keys=k_BKMD.shape[2],
            described=isinstance(bias_HSM, Slopes),
            causal=mask.triangular,
            width=max(q_BHSD.shape[-1], v_BKMD.shape[-1]),
        )
        extras = {**self.settings, **(own or {})}
        compute = kernel.compute if kernel.traced else torch.compiler.disable(kernel.compute)
        return compute(q_BHSD, k_BKMD, v_BKMD, mask, dropout, self.scale, bias_HSM, **extras)

    def drawn(
        self,
        q_BHSD: Tensor,
        k_BKMD: Tensor,
        v_BKMD: Tensor,
        mask: Mask,
        bias_HSM: Bias | None = None,
        own: Extras | None = None,
    ) -> Drawn:
        """As `forward`, with the log-probabilities of what is drawn, of mechanisms that learn by them."""
        assert mask.split is None, "rules refuse columns of a sequence"
        kernel = choose(self.row, self.request, device=q_BHSD.device.type, dtype=q_BHSD.dtype)
        extras = {**self.settings, **(own or {})}
        found: Drawn = self.row.drawn[kernel.name](
            q_BHSD, k_BKMD, v_BKMD, mask, self.scale, bias_HSM, **extras
        )
        return found

    @property
    def has_weights(self) -> bool:
        return self.row.weights is not None

    def entropy(
        self,
        q_BHSD: Tensor,
        k_BKMD: Tensor,
        mask: Mask,
        bias_HSM: Bias | None = None,
        own: Extras | None = None,
    ) -> Tensor:
        """Mean entropy of a sample's rows of weights in nats, [B]."""
        compute = self.row.entropy
        assert compute is not None, "rules refuse the penalty where there is none"
        return compute(q_BHSD, k_BKMD, mask, self.scale, bias_HSM, **self.settings, **(own or {}))

    def weights(
        self,
        q_BHSD: Tensor,
        k_BKMD: Tensor,
        mask: Mask,
        bias_HSM: Bias | None = None,
        own: Extras | None = None,
    ) -> Tensor:
        """Attention weights by the mechanism's reference, [B, H, S, M]."""
        compute = self.row.weights
        assert compute is not None, f"{self.row.name} has no attention weights"
        return compute(q_BHSD, k_BKMD, mask, self.scale, bias_HSM, **self.settings, **(own or {}))

    def shown(
        self,
        q_BHSD: Tensor,
        k_BKMD: Tensor,
        v_BKMD: Tensor,
        mask: Mask,
        bias_HSM: Bias | None = None,
        own: Extras | None = None,
    ) -> Shown:
        """What weights follow from, as `scale q k^T + bias` where they are a softmax of that."""
        scale, form = score_scale(self.scale, q_BHSD), self.row.part
        if form is not None and form.fused:
            extras = {**self.settings, **(own or {})}
            q_BHSD, k_BKMD, _, scale = form.score.prepare(q_BHSD, k_BKMD, k_BKMD, scale, extras)
            mask = form.narrowed(mask, extras)
        return Shown(q_BHSD, k_BKMD, v_BKMD, mask, scale, bias_HSM)


class Own(nn.Module):
    """A mechanism's parameters, by name; cut by heads where tensor parallelism cuts attention."""

    def __init__(self, row: Mechanism, shape: Shape) -> None:
        super().__init__()
        for name, own in row.own.items():
            self.register_parameter(name, nn.Parameter(torch.empty(own.shape(shape))))
        self.names = tuple(row.own)

    def forward(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.names}


class Shown(NamedTuple):
    """What attention computes with, for who compares it with another model's.

    Attributes:
        q_BHSD, k_BKMD, v_BKMD: as scores and outputs are made of them: turned by positions and normalised.
        mask: with the mechanism's scope.
        scale: of q k^T.
        bias_HSM: added to scores, or None.
    """

    q_BHSD: Tensor
    k_BKMD: Tensor
    v_BKMD: Tensor
    mask: Mask
    scale: float
    bias_HSM: Bias | None


class Choice(NamedTuple):
    """What was drawn at every place in training, for the loss.

    Attributes:
        log_BS: log-probability of the keys that a place's heads drew, together.
        baseline_BS: what the loss was expected to be before they were drawn.
    """

    log_BS: Tensor
    baseline_BS: Tensor


class Beside(NamedTuple):
    """What attention gives beside its output, as far as somebody wants it.

    Attributes:
        entropy_B: mean entropy of rows of weights, in nats.
        choice: what was drawn, of mechanisms that learn by it.
        shown: what it computed with.
    """

    entropy_B: Tensor | None = None
    choice: Choice | None = None
    shown: Shown | None = None


class Baseline(nn.Module):
    """w.x + b of a layer's input: what the loss is expected to be before the layer draws.

    Heads share it, for they share the loss. Its gradient stays out of the model, which would else change to be easier
    to foresee (Mnih et al. 2014, section 3; Xu et al. 2015 have a moving average).
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden))
        self.bias = nn.Parameter(torch.empty(1))

    def forward(self, x_BSE: Tensor) -> Tensor:
        """[B, S]"""
        x_BSE = x_BSE.detach().to(self.weight.dtype)
        return (x_BSE * self.weight).sum(-1) + self.bias


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention, of a sequence to itself or to an encoder's output.

    q, k and v are separate products, so that each can be split by heads.
    """

    step: Tensor

    def __init__(self, model: config.Model, seat: Seat = Seat()) -> None:
        super().__init__()
        self.head_dim = model.head_width
        self.first_head = 0  # global index of the first head here; tensor parallelism sets it
        inputs, values = seat.inputs or model.hidden, seat.values or model.hidden
        self.q = build_linear(model, inputs, model.heads * self.head_dim)
        self.k = build_linear(model, inputs, model.kv * self.head_dim)
        self.v = build_linear(model, values, model.kv * self.head_dim)
        self.o = build_linear(model, model.heads * self.head_dim, model.hidden)
        qk_norm = model.attention.qk_norm
        self.q_norm = RMSNorm(self.head_dim, model.norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, model.norm_eps) if qk_norm else None
        self.dropout = Dropout(model.attention.dropout)
        word = word_of(model.attention, seat)
        row, shape = mechanism(word), attention_shape(model, word, seat)
        self.own = Own(row, shape) if row.own else None
        self.widths = {name: width(shape) for name, width in row.gates.items()}
        self.gates = nn.ModuleDict(
            {name: build_linear(model, inputs, model.heads * width) for name, width in self.widths.items()}
        )
        self.draws, self.composed = row.draws, row.part is not None
        if row.draws:
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.baseline = Baseline(inputs) if row.drawn else None
        self.core = Core(model.attention, word, seat.layer)
        # A mechanism that sorts tokens, or cuts queries as it cuts keys, answers for every place; the first are kept.
        self.every_query = row.kind == "heads" and "cross" not in row.supports
        self.longest = self.core.settings["span"] if row.name == "span" else None
        self.wants_entropy = model.attention.entropy_penalty != 0 and not seat.cross
        self.shows = False  # a tap of the block sets it

    def forward(
        self,
        x_BSE: Tensor,
        mask: Mask,
        turn: Rotation | None = None,
        noise: Noise | None = None,
        bias_HSM: Bias | None = None,
        memory_BME: Tensor | None = None,
        queries: int | None = None,
        values_BME: Tensor | None = None,
    ) -> tuple[Tensor, Beside]:
        """Returns [B, S, E], and what is wanted beside: entropy by the loss; what was drawn, in training; what a tap
        reads.

        `queries`: how many places ask, from the first on; all if None. Then S is their number, and the mask has no
        documents. `values_BME`: what values are made of, where it is not what keys are made of.
        """
        x_BSE = narrowed(x_BSE)
        source = x_BSE if memory_BME is None else narrowed(memory_BME)
        valued = source if values_BME is None else narrowed(values_BME)
        first = None
        if self.every_query:
            queries, first = None, queries
        if queries is not None:
            x_BSE = x_BSE[:, :queries]
            bias_HSM = None if bias_HSM is None else part_of(bias_HSM, slice(0, queries))
        q_BHSD, k_BKMD, v_BKMD = (
            self._heads(self.q(x_BSE)),
            self._heads(self.k(source)),
            self._heads(self.v(valued)),
        )
        if isinstance(bias_HSM, Slopes):
            bias_HSM = bias_HSM.of_heads(self.first_head, q_BHSD.shape[1])
            bias_HSM = bias_HSM if self.composed else bias_HSM.block()  # others take a bias written out
        if self.q_norm is not None and self.k_norm is not None:
            q_BHSD, k_BKMD = self.q_norm(q_BHSD), self.k_norm(k_BKMD)
        if turn is not None:
            q_BHSD, k_BKMD = rotate_both(q_BHSD, k_BKMD, turn)
        dropout, own = self._weight_dropout(noise, x_BSE.shape[1]), self._own(x_BSE, noise)
        entropy = choice = shown = None
        if self.baseline is not None and noise is not None:
            y_BHSD, log_BHS = self.core.drawn(q_BHSD, k_BKMD, v_BKMD, mask, bias_HSM, own)
            choice = Choice(log_BHS.sum(1), self.baseline(x_BSE))
        else:
            y_BHSD = self.core(q_BHSD, k_BKMD, v_BKMD, mask, dropout, bias_HSM, own)
            if self.wants_entropy:
                entropy = self.core.entropy(q_BHSD, k_BKMD, mask, bias_HSM, own)
        if self.shows:
            shown = self.core.shown(q_BHSD, k_BKMD, v_BKMD, mask, bias_HSM, own)
        beside = Beside(entropy, choice, shown)
        return self.o(y_BHSD[:, :, :first].transpose(1, 2).flatten(2)), beside

    def mean_span(self) -> Tensor | None:
        """Mean learned span of the heads here as a share of the longest, 0-dim; None where none is learned."""
        if self.longest is None:
            return None
        assert self.own is not None
        reach = self.own()["reach"]
        return (
            spans(reach.to(torch.promote_types(reach.dtype, torch.float32)), self.longest).mean()
            / self.longest
        )

    def _heads(self, x: Tensor) -> Tensor:
        # The number of heads is inferred: under tensor parallelism only some of them are here.
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _own(self, x_BSE: Tensor, noise: Noise | None) -> dict[str, Any]:
        """What the mechanism reads beside queries, keys and values."""
        own: dict[str, Any] = {} if self.own is None else self.own()
        for name, gate in self.gates.items():
            y = gate(x_BSE)
            own[name] = y.unflatten(-1, (-1, self.widths[name])).transpose(1, 2)
        if self.draws:
            own["draw"] = self._draw(noise, x_BSE.shape[1])
        return own

    def _draw(self, noise: Noise | None, length: int) -> Draw:
        if noise is None:
            return Draw(self.dropout.salt, self.step, first_head=self.first_head)
        if noise.step is not None:
            self.step.copy_(noise.step)
        where = noise.slots_B, noise.places(length), self.first_head
        return Draw(self.dropout.salt, self.step, self.dropout.key(noise), *where)

    def _weight_dropout(self, noise: Noise | None, length: int) -> WeightDropout | None:
        p = self.dropout.p
        if noise is None or p == 0:
            return None
        return WeightDropout(p, self.dropout.key(noise), noise.slots_B, noise.places(length), self.first_head)


def word_of(attention: config.Attention, seat: Seat) -> str:
    """The mechanism of a layer; of cross-attention the words of it that can look at another sequence."""
    word = attention.of_layer(seat.layer)
    if not seat.cross:
        return word
    able = [part for part in word.split("+") if "cross" in mechanism(part).supports]
    return "+".join(able) or "dense"


def attention_shape(model: config.Model, word: str, seat: Seat) -> Shape:
    """What a mechanism's parameters and costs depend on, for a row of `seat.tokens`."""
    settings = model.attention.settings(seat.layer, mechanism(word).settings)
    sizes = model.heads, model.kv, model.head_width, model.hidden, seat.tokens, seat.tokens
    return Shape(*sizes, seat.causal, settings, seat.layer)
