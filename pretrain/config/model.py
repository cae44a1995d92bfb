"""Shape of the model. Vocabulary, lengths, image size and classes come from the data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from headway.pretrain.config.attention import Attention
from headway.pretrain.config.base import AboveZero, Count, Fraction, NotNegative, Positive, Section


class Experts(Section):
    """Mixture of experts in place of feed-forward layers. Routing decisions depend on a row of the batch alone
    (the row is the group of GShard), so that they are the same at every layout."""

    count: Count = 0
    """Experts of a layer; 0 is a dense model."""
    pattern: Annotated[str, Field(pattern=r"^[DE]+$")] = "E"
    """Which layers have experts: letters D (dense) and E (experts), repeated over the layers ("DE": every
    second, Switch; one letter a layer says it layer by layer)."""
    ffn: Positive | None = None
    """Width of an expert; the model's feed-forward width if not given."""
    routing: Literal["tokens", "experts"] = "tokens"
    """Tokens choose their best experts, or experts their best tokens (Zhou et al. 2022; not for causal models)."""
    top_k: Positive = 2
    """Experts of a token (1: Switch); with expert choice, on average."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    """The weights of a token's chosen experts sum to one (Mixtral); false keeps their scores (Switch)."""
    capacity: AboveZero | None = None
    """An expert takes at most this times its even share of a row's tokens, the others are dropped; dropless if
    not given."""
    shared: Count = 0
    """Experts that every token passes, beside the routed ones (DeepSeekMoE)."""
    balance: NotNegative = 0.01
    """Weight of the load-balancing loss (Switch, equation 4)."""
    z_loss: NotNegative = 0.001
    """Weight of the router's squared log-partition (ST-MoE, equation 5)."""
    bias_rate: NotNegative = 0.0
    """Step of the bias that balances the load without a loss (Wang et al. 2024); 0 has no bias."""
    jitter: Fraction = 0.0
    """Router inputs are multiplied by uniform noise of 1 - jitter to 1 + jitter in training (Switch)."""
    kernel: Literal["auto", "reference", "grouped", "batched"] = "auto"
    """How experts are computed: a loop over experts, torch's grouped products, or padded batched products."""


class Bottleneck(Section):
    """Blocks that work at a width of their own, between linear layers from `hidden` and back to it (Sun et al. 2020):
    MobileBERT's are narrower, its teacher's wider. Normed (post-norm), dropped and scaled is what a block adds."""

    hidden: Positive | None = None
    """Width inside: of heads together, of norms, of feed-forward layers' inputs; none has no bottleneck."""
    reads: Literal["shared", "outside", "inside"] = "shared"
    """What attention reads. `shared`: queries and keys a second linear layer, values the block's input (MobileBERT).
    `outside`: all the block's input (IB-BERT). `inside`: all what the bottleneck lets in (MobileBERT-tiny)."""
    ffns: Positive = 1
    """Feed-forward layers, one after the other; the last may be experts."""


class Vision(Section):
    """Patches of images."""

    patch: Positive = 16
    """Side of a patch in pixels."""
    class_token: bool = True
    """A learned token stands before the patches."""
    distill_token: bool = False
    """A second learned token, after the class token, whose head learns from a teacher (DeiT, Touvron et al. 2021)."""

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches, which have no place on the grid."""
        return int(self.class_token) + int(self.distill_token)


class RotaryScaling(Section):
    """Rotary angles made smaller, so that rows may be longer than those that a model was trained on."""

    kind: Literal["none", "linear", "ntk", "yarn", "llama3"] = "none"
    """`linear`: all (Chen et al. 2023). `ntk`: by a larger base (bloc97 2023). `yarn`: slow ones, by features, and
    scores grow (Peng et al. 2024). `llama3`: slow ones, by turns (Llama 3.1)."""
    factor: AboveZero = 1.0
    """How many times longer rows become."""
    original_length: Positive | None = None
    """Tokens of a row that the model was trained on before (yarn, llama3)."""
    slow: AboveZero | None = None
    """Features that turn fewer times over the original length are stretched in full: 1 if not given."""
    fast: AboveZero | None = None
    """Features that turn more often are not stretched: 32 (yarn) or 4 (llama3) if not given."""
    whole: bool = True
    """YaRN's ramp begins and ends at whole features, as in its authors' code."""
    attention_factor: AboveZero | None = None
    """Factor of cosines and sines under yarn; 0.1 ln(factor) + 1 if not given."""


class Init(Section):
    """Initial weights: functions of (seed, canonical name, global coordinates)."""

    scheme: Literal["gpt2", "normal", "bert", "t5", "xavier", "orthogonal", "tfixup", "vit"] = "gpt2"
    """`gpt2`: normal, projections into the residual stream / sqrt(2 layers). `normal`: all alike. `bert`: normal
    cut off at two deviations. `t5`: by fan-in (Raffel et al. 2020). `xavier`: uniform (Glorot and Bengio 2010).
    `orthogonal`: Saxe et al. 2014. `tfixup`: for models without norms (Huang et al. 2020). `vit`: as timm."""
    std: AboveZero = 0.02
    """Standard deviation of gpt2, normal, bert and vit."""
    lsuv: bool = False
    """Scale every linear layer to outputs of unit variance on the first batch (Mishkin and Matas 2016)."""


class Model(Section):
    """Shape of the model."""

    family: Literal["gpt", "bert", "t5", "vit"] = "gpt"
    layers: Positive = 12
    """Blocks; of T5, blocks of the encoder."""
    decoder_layers: Positive | None = None
    """Blocks of T5's decoder; as many as the encoder has if not given."""
    unique_layers: Positive | None = None
    """Blocks that have weights of their own, each used `layers / unique_layers` times in a row (ALBERT: 1)."""
    hidden: Positive = 768
    heads: Positive = 12
    kv_heads: Positive | None = None
    """Key/value heads: `heads` is multi-head (default), 1 multi-query, between them grouped-query."""
    head_dim: Positive | None = None
    """Width of a head; hidden / heads if not given, of a bottleneck's width if there is one."""
    ffn: Positive | None = None
    """Feed-forward width; 4 x hidden if not given, 8/3 x hidden rounded up to 64 for gated activations (of a
    bottleneck's width if there is one)."""
    activation: Literal["gelu", "gelu_tanh", "relu", "relu2", "silu", "swiglu", "geglu", "geglu_tanh"] = (
        "gelu_tanh"
    )
    norm: Literal["layernorm", "rmsnorm", "affine", "none"] = "layernorm"
    """`affine` multiplies and adds without statistics (MobileBERT's NoNorm); the masked head keeps LayerNorm."""
    norm_position: Literal["pre", "post"] = "pre"
    norm_eps: AboveZero = 1e-5
    embedding_norm: bool = False
    """Normalise the sum of embeddings (BERT)."""
    embedding_size: Positive | None = None
    """Width of the token table, projected up to `hidden` (ALBERT); `hidden` if not given."""
    embedding_trigram: bool = False
    """A token's row is projected to `hidden` together with its neighbours' before positions are added (MobileBERT);
    the masked head then predicts at `hidden`, beside a tied table with columns of its own."""
    embedding_scale: bool = False
    """Multiply token embeddings by sqrt(hidden) (Vaswani et al. 2017, section 3.4)."""
    segments: Count = 0
    """Rows of the segment table, added to the embeddings (BERT: 2)."""
    pooler: bool = False
    """A tanh layer over the first position (BERT), for objectives that classify rows."""
    positions: Literal["learned", "sinusoidal", "rotary", "relative", "alibi", "none"] = "learned"
    """`sinusoidal` is Vaswani et al. 2017, of images in two dimensions (MoCo v3, MAE); `relative` is T5's
    bucketed bias; `alibi` a bias that falls with the distance (Press et al. 2022)."""
    max_positions: Positive | None = None
    """Rows of the learned position table; the length of a row of the data if not given."""
    rotary_base: AboveZero = 10000.0
    rotary_scaling: RotaryScaling = RotaryScaling()
    relative_buckets: Positive = 32
    relative_distance: Positive = 128
    """Distance beyond which all keys share a bucket."""
    tied: bool = True
    """The head shares its weight with the token embedding."""
    head_scale: AboveZero = 1.0
    """Factor of the hidden states before the head (T5 with a tied head: 1 / sqrt(hidden))."""
    bias: bool = True
    """Biases in linear layers and in LayerNorm."""
    dropout: Fraction = 0.0
    """Dropout of embeddings and of what each sub-layer adds to the residual stream."""
    stochastic_depth: Fraction = 0.0
    """Chance that the last block's sub-layers are skipped for a sample; grows linearly from 0 at the first
    (Huang et al. 2016)."""
    layer_scale: AboveZero | None = None
    """Initial value of learned factors of what sub-layers add (Touvron et al. 2021); none if not given."""
    spectral: bool = False
    """Linear layers of blocks use gain x W / spectral norm of W (sigmaReparam, Zhai et al. 2023)."""
    init: Init = Init()
    attention: Attention = Attention()
    experts: Experts = Experts()
    bottleneck: Bottleneck = Bottleneck()
    vision: Vision = Vision()

    @property
    def gated(self) -> bool:
        return self.activation.startswith(("swiglu", "geglu"))

    @property
    def biased(self) -> bool:
        """Whether positions add a bias to attention scores."""
        return self.positions in ("relative", "alibi")

    @property
    def inner_width(self) -> int:
        """Width at which blocks compute: of the bottleneck, where there is one."""
        return self.bottleneck.hidden or self.hidden

    @property
    def table_width(self) -> int:
        """Of a token's row."""
        return self.embedding_size or self.hidden

    @property
    def word_width(self) -> int:
        """Of what the head's words multiply."""
        return self.hidden if self.embedding_trigram else self.table_width

    @property
    def head_width(self) -> int:
        return self.head_dim or self.inner_width // self.heads

    @property
    def kv(self) -> int:
        return self.kv_heads or self.heads

    @property
    def ffn_width(self) -> int:
        if self.ffn:
            return self.ffn
        width = self.inner_width
        return -(-8 * width // 3 // 64) * 64 if self.gated else 4 * width

    @property
    def decoder_depth(self) -> int:
        """Blocks of the decoder of an encoder-decoder."""
        return self.decoder_layers or self.layers

    def has_experts(self, layer: int) -> bool:
        """Whether a layer (from 0) has experts."""
        e = self.experts
        return e.count > 0 and e.pattern[layer % len(e.pattern)] == "E"
