"""The Job: one tree of settings that names a run, strict and self-describing.

One value has one owner. ``data.seq_len`` and the tokenizer's vocabulary are given to the model when it is
built; they are not repeated here. Anything that is left ``None`` is derived, and the property beside it
says how.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from headway.pretrain.errors import JobError

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
AxisSize = Annotated[int, Field(ge=-1)]


class Section(BaseModel):
    """Base of all sections: unknown keys and loose types are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Run(Section):
    """Where the run lives."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run's folder and of its W&B run."""
    dir: str = "runs"
    """Folder that holds the run folders."""


class Attention(Section):
    """What attention means (mechanism) and how it is computed here (kernel)."""

    mechanism: Literal["dense"] = "dense"
    kernel: Literal["auto", "reference", "sdpa", "blocks"] = "auto"
    """`auto` chooses by device, shape and mask, and the choice is printed; a name is never replaced."""
    qk_norm: bool = False
    """RMS-normalise queries and keys per head before the scores (Henry et al. 2020, Qwen3)."""
    dropout: Fraction = 0.0
    """Dropout of attention weights."""


class Model(Section):
    """Shape of the model. Vocabulary and sequence length come from `data`."""

    family: Literal["gpt"] = "gpt"
    layers: Positive = 12
    hidden: Positive = 768
    heads: Positive = 12
    kv_heads: Positive | None = None
    """Key/value heads: `heads` is multi-head (default), 1 multi-query, between them grouped-query."""
    head_dim: Positive | None = None
    """Width of a head; hidden / heads if not given."""
    ffn: Positive | None = None
    """Feed-forward width; 4 x hidden if not given, 8/3 x hidden rounded up to 64 for gated activations."""
    activation: Literal["gelu", "gelu_tanh", "relu", "relu2", "silu", "swiglu", "geglu"] = "gelu_tanh"
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_position: Literal["pre", "post"] = "pre"
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    positions: Literal["learned", "rotary", "none"] = "learned"
    max_positions: Positive | None = None
    """Rows of the learned position table; `data.seq_len` if not given."""
    rotary_base: Annotated[float, Field(gt=0)] = 10000.0
    tied: bool = True
    """The head shares its weight with the token embedding."""
    bias: bool = True
    """Biases in linear layers and in LayerNorm."""
    dropout: Fraction = 0.0
    """Dropout of embeddings and of what each sub-layer adds to the residual stream."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of initial weights; projections into the residual stream get it / sqrt(2 layers)."""
    attention: Attention = Attention()

    @property
    def gated(self) -> bool:
        return self.activation in ("swiglu", "geglu")

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden // self.heads

    @property
    def kv(self) -> int:
        return self.kv_heads or self.heads

    @property
    def ffn_width(self) -> int:
        if self.ffn:
            return self.ffn
        return -(-8 * self.hidden // 3 // 64) * 64 if self.gated else 4 * self.hidden


class Tokenizer(Section):
    """How text becomes tokens. Without a path, a SentencePiece model is trained on the sources."""

    kind: Literal["sentencepiece", "huggingface", "bytes"] = "sentencepiece"
    path: str | None = None
    """A `.model` (sentencepiece) or `tokenizer.json` (huggingface)."""
    vocab: Annotated[int, Field(ge=260)] = 32768
    """Pieces of a tokenizer that is trained here."""
    span: Literal["line", "word"] = "line"
    """How far its pieces reach: over words within a line (fewest tokens), or one word with spaces before it."""
    train_bytes: Positive = 30_000_000
    """At most this many bytes of the corpus are shown to the trainer, which takes 65 bytes of memory for each."""


class Source(Section):
    """Where documents come from.

    A path or glob of text, JSONL or Parquet files (each also `.gz` or `.zst`), a folder of files, a token
    store (the path without `.bin`/`.idx`), or `stdlib:`, the sources of the running Python's library.
    """

    path: str
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the blend, relative to the other sources."""
    column: str = "text"
    """Field of a JSONL object or column of a Parquet table that holds the text."""


def _source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class Data(Section):
    """What is read, and in which shape."""

    sources: Annotated[
        list[Annotated[Source, BeforeValidator(_source)]],
        BeforeValidator(lambda v: [v] if isinstance(v, str) else v),
        Field(min_length=1),
    ] = [Source(path="stdlib:")]
    seq_len: Positive = 1024
    """Tokens in a row."""
    tokenizer: Tokenizer = Tokenizer()
    heldout: Fraction = 0.05
    """Share of documents kept out of training, chosen by a hash of their path (files) or place (rows)."""
    documents: Literal["attend", "isolate"] = "attend"
    """Whether a token sees earlier documents of its packed row."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a malformed line does while a store is built; skipped lines are counted and reported."""
    cache: str | None = None
    """Folder of built tokenizers and stores; $HEADWAY_CACHE or ~/.cache/headway if not given."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that build a store; 0 takes all cores."""


class Objective(Section):
    """What is minimised."""

    name: Literal["causal"] = "causal"
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared log-partition function (PaLM, section 5)."""
    chunk: Positive | None = None
    """Rows of logits that exist at once; chosen by the kernel if not given."""


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class Optimizer(Section):
    """How parameters move. Weight decay spares biases, norms and other vectors."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon` moves hidden matrices by Muon and everything else by AdamW."""
    lr: Annotated[float, Field(gt=0)] = 3e-4
    betas: Annotated[tuple[Fraction, Fraction], BeforeValidator(_pair)] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this global norm; null does not clip."""
    muon_lr: Annotated[float, Field(gt=0)] = 0.02
    """Learning rate of the matrices that Muon moves; the schedule scales it as it scales `lr`."""
    momentum: Fraction = 0.95
    """Momentum of Muon."""


class Schedule(Section):
    """Learning rate over steps, as a factor of `optimizer.lr`."""

    name: Literal["constant", "cosine", "linear", "inverse_sqrt", "wsd"] = "cosine"
    warmup: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warmup."""
    warmup_tokens: Positive | None = None
    """Warmup given in tokens instead of steps."""
    steps: Positive | None = None
    """Where the decay ends; `train.steps` if not given."""
    floor: Fraction = 0.1
    """Last factor of cosine, linear and wsd."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the steps that wsd (warmup, stable, decay) spends on its decay."""


class Parallel(Section):
    """How the run is spread. One axis of size -1 takes what the others leave."""

    engine: Literal["native"] = "native"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    pipeline: AxisSize = 1
    replicate: AxisSize = 1
    """Replicas whose gradients are all-reduced: with `shard` 1 plain DDP, else the outer axis of HSDP."""
    shard: AxisSize = -1
    """Ranks over which parameters, gradients and optimizer state are sharded (FSDP2)."""
    context: AxisSize = 1
    tensor: AxisSize = 1
    expert: AxisSize = 1
    micro_batch: Positive | None = None
    """Rows of a micro-batch on one rank; all of the rank's rows at once if not given."""
    reshard: bool = True
    """Free gathered parameters after the forward (ZeRO-3); false keeps them for the backward (ZeRO-2)."""
    timeout: Positive = 600
    """Seconds that a collective may take."""


class Train(Section):
    """How long, how much at once, from where."""

    steps: Positive = 1000
    global_batch: Positive = 32
    """Rows in an optimizer step, over all ranks and micro-batches."""
    seed: Annotated[int, Field(ge=0)] = 0
    start_from: str | None = None
    """A checkpoint or run folder whose weights a new run starts from."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile; `auto` compiles where a compiler is found and the run is long enough to win."""
    eval_every: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations on held-out rows; 0 evaluates at the end only."""
    eval_rows: Positive = 64
    """Held-out rows of such an evaluation; the last one takes them all."""
    eval_overlap: Fraction = 0.5
    """Share of a held-out row that is context only: every token is then scored with at least that much."""


class Checkpoint(Section):
    """When state is saved and what is kept."""

    every: Annotated[int, Field(ge=0)] = 100
    """Steps between checkpoints; 0 saves at the end only."""
    keep_last: Positive = 2
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Checkpoints at multiples of this many steps are kept for good; 0 keeps none for good."""
    background: bool = True
    """Write while training goes on; the step waits only for the copy to host memory."""


class Tracking(Section):
    """Who is told."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """`auto` is online with an API key and offline without one."""
    project: str = "headway"
    group: str | None = None
    tags: list[str] = []
    histograms_every: Annotated[int, Field(ge=0)] = 0
    """Steps between histograms of gradients; 0 sends none."""
    prompt: str = "def main():\n"
    """Text that is continued at the end of the run and drawn as attention maps in the report."""


class Job(Section):
    """One run, whole."""

    run: Run = Run()
    model: Model = Model()
    data: Data = Data()
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    parallel: Parallel = Parallel()
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    """Dtype of matrix products; weights, optimizer state and reductions stay fp32 (fp64 for fp64)."""
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()

    def model_post_init(self, _: Any) -> None:
        check_model(self)
        check_schedule(self)


def check_model(job: Job) -> None:
    """Rules that bind several settings of the model; raises JobError."""
    m = job.model
    if m.head_dim is None and m.hidden % m.heads:
        nearest = min(
            (h for h in range(1, m.hidden + 1) if m.hidden % h == 0), key=lambda h: abs(h - m.heads)
        )
        raise JobError("model.heads", m.heads, f"must divide model.hidden = {m.hidden}", nearest)
    if m.heads % m.kv:
        nearest = min((k for k in range(1, m.heads + 1) if m.heads % k == 0), key=lambda k: abs(k - m.kv))
        raise JobError("model.kv_heads", m.kv_heads, f"must divide model.heads = {m.heads}", nearest)
    if m.positions == "rotary" and m.head_width % 2:
        raise JobError(
            "model.head_dim", m.head_width, "rotary positions turn pairs: must be even", m.head_width + 1
        )
    if m.positions == "learned" and m.max_positions and job.data.seq_len > m.max_positions:
        rule = (
            f"must not exceed model.max_positions = {m.max_positions}, the rows of the learned position table"
        )
        raise JobError("data.seq_len", job.data.seq_len, rule, m.max_positions)


def check_schedule(job: Job) -> None:
    """Rules of the schedule; raises JobError."""
    s, steps = job.schedule, job.schedule.steps or job.train.steps
    if s.warmup and s.warmup_tokens:
        rule = f"give warmup in steps or in tokens, not both (schedule.warmup_tokens = {s.warmup_tokens})"
        raise JobError("schedule.warmup", s.warmup, rule, 0)
    if s.warmup >= steps and s.warmup > 0:
        raise JobError(
            "schedule.warmup", s.warmup, f"must be less than the {steps} steps of the schedule", steps - 1
        )
