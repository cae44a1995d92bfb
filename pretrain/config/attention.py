"""Attention: what it means, a word of the registry, and the numbers that words read."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

from headway.pretrain.config.base import AboveZero, Count, Fraction, NotNegative, Positive, Section, as_tuple

Words = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]


class Attention(Section):
    """What attention means (mechanism) and how it is computed here (kernel). Numbers that are not given are the
    mechanism's own, which `headway attention ls` shows; one that no mechanism of the model reads has no effect."""

    mechanism: str = "dense"
    """A word of `headway attention ls`; words for scores, weightings and scopes compose: `window+sink`. Of all layers,
    and of cross-attention where it can be."""
    pattern: Words = ()
    """Mechanisms of the layers, repeated over them (`[window, window, dense]`); `mechanism` in all if not given."""
    kernel: str = "auto"
    """`auto` chooses by device, shape and mask, and the choice is printed; a name (`reference`, `sdpa`, `blocks` and
    what the mechanism has) is never replaced."""
    qk_norm: bool = False
    """RMS-normalise queries and keys per head before the scores (Henry et al. 2020, Qwen3)."""
    dropout: Fraction = 0.0
    """Dropout of attention weights."""
    scale: AboveZero | None = None
    """Factor of the scores; 1 / sqrt(head dimension) if not given (T5: 1)."""
    entropy_penalty: float = 0.0
    """Weight in the loss of the mean entropy of attention rows, in nats: positive sharpens attention, negative
    keeps it from collapsing (Zhai et al. 2023)."""
    window: Positive | None = None
    """Tokens see only tokens less than so many places away (Mistral's `sliding_window`)."""
    dilation: Positive | None = None
    """Places from one key of a window to the next."""
    block: Positive | None = None
    """Tokens of a block."""
    neighbours: Count | None = None
    """Blocks (of graphs: tokens or patches) on each side that are seen beside one's own."""
    stride: Positive | None = None
    """Places from one distant key to the next; of convolutions, from one output to the next."""
    summaries: Positive | None = None
    """Tokens at the end of a block that stand for it."""
    global_tokens: Count | None = None
    """First tokens of a row that all see."""
    random_blocks: Count | None = None
    """Blocks drawn at random for every block."""
    selected: Positive | None = None
    """Keys or blocks that a query chooses by their content."""
    clusters: Positive | None = None
    """Groups of tokens that see each other."""
    features: Positive | None = None
    """Random features of a head."""
    redraw: Count | None = None
    """Optimizer steps after which random features are drawn anew; 0 keeps them."""
    rank: Positive | None = None
    """Width of a bottleneck: of latent keys and values, of projected sequences."""
    query_rank: Count | None = None
    """Width of latent queries; 0 has none."""
    rotary_dim: Count | None = None
    """Features of a head that positions turn, where they are apart from the others."""
    latents: Positive | None = None
    """Learned points that read the sequence, and that it reads."""
    depth: Positive | None = None
    """Layers, levels or order within the mechanism."""
    width: Positive | None = None
    """Hidden width of what makes filters or summaries."""
    span: Positive | None = None
    """Longest learned span."""
    ramp: Positive | None = None
    """Places over which a learned span fades out."""
    softcap: AboveZero | None = None
    """Bound of the scores."""
    temperature: AboveZero | None = None
    """Of a relaxed choice."""
    points: Positive | None = None
    """Places that a query samples."""
    reduction: Positive | None = None
    """Channels of the input for one of a gate's bottleneck."""
    kernel_size: Positive | None = None
    """Width of a convolution."""
    span_penalty: NotNegative = 0.0
    """Weight in the loss of the mean learned span, as a share of the longest (Sukhbaatar et al. 2019)."""

    def of_layer(self, layer: int) -> str:
        """The mechanism of a layer's self-attention, counted from 0."""
        return self.pattern[layer % len(self.pattern)] if self.pattern else self.mechanism

    @property
    def mechanisms(self) -> tuple[str, ...]:
        """All that the model has, each once."""
        return tuple(dict.fromkeys((*self.pattern, *([] if self.pattern else [self.mechanism]))))

    def settings(self, layer: int, known: dict[str, Any] | Any) -> dict[str, Any]:
        """Numbers that a mechanism reads, given or its own.

        Args:
            layer: some defaults depend on it.
            known: the mechanism's settings and their defaults.
        """
        given = {name: getattr(self, name, None) for name in known}
        return {
            name: given[name] if given[name] is not None else default(layer) if callable(default) else default
            for name, default in known.items()
        }
