"""Where and how long a run goes, how it is spread, what is kept and who is told."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from headway.pretrain.config.base import AboveZero, AxisSize, Count, Fraction, NotNegative, Positive, Section
from headway.pretrain.config.deepspeed import DeepSpeed
from headway.pretrain.config.megatron import Megatron
from headway.pretrain.config.trackers import BackendName


class Run(Section):
    """Where the run lives."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run's folder and of its W&B run."""
    dir: str = "runs"
    """Folder that holds the run folders."""


class TeacherLayout(Section):
    """How the teacher of a distillation is spread over the run's ranks; the student's layout if nothing is given."""

    ranks: Count = 0
    """The last so many ranks of the run are the teacher's alone; with 0 all ranks are the student's and the
    teacher's."""
    tensor: Positive | None = None
    """As the student's if not given."""
    context: Positive | None = None
    """As the student's if not given."""
    replicate: Positive = 1
    shard: AxisSize = -1
    """Ranks over which the teacher's weights are sharded; what the other axes leave if -1."""


class Parallel(Section):
    """How the run is spread. One axis of size -1 takes what the others leave."""

    engine: Literal["native", "deepspeed", "megatron"] = "native"
    """Who compiles the model's plan: PyTorch alone, DeepSpeed, or Megatron-Core. The curve is the same."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    pipeline: AxisSize = 1
    replicate: AxisSize = 1
    """Replicas whose gradients are all-reduced: with `shard` 1 plain DDP, else the outer axis of HSDP."""
    shard: AxisSize = -1
    """Ranks over which parameters, gradients and optimizer state are sharded (FSDP2)."""
    context: AxisSize = 1
    tensor: AxisSize = 1
    sequence: bool = True
    """Between attention and feed-forward layers every tensor rank holds a part of the sequence."""
    expert: AxisSize = 1
    context_method: Literal["ring", "ulysses"] = "ring"
    """How attention reaches keys of other context ranks: they go round, or heads are exchanged for columns."""
    schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"] = (
        "1f1b"
    )
    """Order of micro-batches in the pipeline."""
    virtual: Positive | None = None
    """Stages of a pipeline rank; what the schedule needs at least if not given."""
    micro_batch: Positive | None = None
    """Rows of a micro-batch on one rank; all of the rank's rows at once if not given."""
    reshard: bool = True
    """Free gathered parameters after the forward (ZeRO-3); false keeps them for the backward (ZeRO-2). In a pipeline,
    whose micro-batches are under way at once, they stay for the step either way."""
    recompute: Literal["none", "full", "attention", "products", "budget"] = "none"
    """What the backward computes again: nothing; whole blocks; the attention core; all but matrix products; or as
    little as `recompute_budget` allows."""
    recompute_every: Positive = 1
    """With `full`: every so many blocks one is computed again."""
    recompute_budget: AboveZero | None = None
    """With `budget`: GiB that activations of a micro-batch may take on a rank."""
    offload: bool = False
    """Keep what the backward needs of blocks in host memory, and fetch it in time."""
    check_every: Count = 0
    """Steps between checks that replicas hold the same bits; 0 makes none."""
    timeout: Positive = 600
    """Seconds that a collective may take."""
    start_timeout: Positive = 300
    """Seconds within which all ranks must have come."""
    teacher: TeacherLayout = TeacherLayout()
    deepspeed: DeepSpeed = DeepSpeed()
    megatron: Megatron = Megatron()


class Ramp(Section):
    """A global batch that grows (Smith et al. 2018; GPT-3, table 2.1)."""

    start: Positive | None = None
    """Rows of the first step; no ramp if not given."""
    increment: Positive = 32
    """Rows that are added at a time."""
    samples: Positive | None = None
    """Samples over which the batch grows to `train.global_batch`, in even parts; must be given with `start`."""


class Train(Section):
    """How long, how much at once, from where."""

    steps: Positive = 1000
    global_batch: Positive = 32
    """Rows in an optimizer step, over all ranks and micro-batches."""
    ramp: Ramp = Ramp()
    seed: Count = 0
    start_from: str | None = None
    """A checkpoint or run folder, Headway's or Hugging Face's, whose weights a new run starts from."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile; `auto` compiles where a compiler is found and the run is long enough to win."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Who computes norms, gates, rotary, dropout, losses over words, experts' rows and optimizer steps where they are
    not compiled: `auto` takes Triton's fused kernels on GPUs, `torch` PyTorch's operators everywhere, `triton` refuses
    where they cannot run. `model.attention.kernel` is beside."""
    eval_every: Count = 0
    """Steps between evaluations on held-out rows; 0 evaluates at the end only."""
    eval_rows: Positive = 64
    """Held-out rows of such an evaluation; the last one takes them all."""
    eval_overlap: Fraction = 0.5
    """Share of a held-out row that is context only: every token is then scored with at least that much."""


class Checkpoint(Section):
    """When state is saved and what is kept."""

    every: Count = 100
    """Steps between checkpoints; 0 saves at the end only."""
    keep_last: Positive = 2
    keep_every: Count = 0
    """Checkpoints at multiples of this many steps are kept for good; 0 keeps none for good."""
    background: bool = True
    """Write while training goes on; the step waits only for the copy to host memory."""


class Prometheus(Section):
    """Where a Prometheus server can read the run's numbers while it goes."""

    host: str = "127.0.0.1"
    """Address that is listened on: this machine's own, unless another is given. Whoever reaches it can read."""
    port: Annotated[int, Field(ge=0, le=65535)] = 9109
    """0 takes one that is free; either way `prometheus.json` in the run's folder names it."""


AlertKind = Literal["diverged", "failed", "done", "checkpoint"]


class Energy(Section):
    """How a run's energy is measured, and what a kilowatt-hour stands for."""

    source: Literal["auto", "rapl", "nvml", "tdp", "off"] = "auto"
    """Counters of the processors (rapl) or of NVIDIA's GPUs (nvml), or an estimate from what devices may draw at most
    (tdp); `auto` measures where it can, estimates where it cannot, and says which."""
    watts: AboveZero | None = None
    """Power of a rank's device, for an estimate; from a table by the device's name if not given."""
    pue: Annotated[float, Field(ge=1)] = 1.0
    """What the building draws for each unit that its computers do (power usage effectiveness)."""
    grid: NotNegative | str | None = None
    """Kilograms of CO2 equivalent a kWh, or a country's code (FR) for its average; the world's average if not
    given."""


class Tracking(Section):
    """Who is told."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """`auto` is online with an API key and offline without one."""
    entity: str | None = None
    """W&B user or team; $WANDB_ENTITY, else the key's own, if not given."""
    project: str | None = None
    """Project of W&B and of Accelerate's trackers; of W&B $WANDB_PROJECT, else `headway`, if not given."""
    group: str | None = None
    """$WANDB_RUN_GROUP if not given."""
    job_type: str | None = None
    """$WANDB_JOB_TYPE if not given."""
    tags: list[str] = []
    """$WANDB_TAGS if not given."""
    notes: str | None = None
    """$WANDB_NOTES if not given."""
    x_axis: Literal["step", "tokens"] = "step"
    """What W&B's charts have on their x axis; `tokens` are those seen so far."""
    alerts: list[AlertKind] = ["diverged", "failed", "done", "checkpoint"]
    """Of what W&B sends a mail or a Slack message: loss or gradient not finite, or replicas apart; another failure; the
    end; a checkpoint that was not saved."""
    backends: list[BackendName] = []
    """Who is told beside W&B: `tensorboard` (event files in the run folder), `prometheus` (an endpoint over HTTP), and
    the trackers that Accelerate keeps: `aim`, `clearml`, `comet_ml`, `dvclive`, `mlflow`, `swanlab`, `trackio`."""
    prometheus: Prometheus = Prometheus()
    trackers: dict[str, dict[str, Any]] = {}
    """Tracker of Accelerate's -> further arguments of its start, which Accelerate calls its `init_kwargs`."""
    exporters: dict[str, str] = {}
    """Name -> address of Prometheus pages (DCGM or node exporters of other nodes) that W&B records beside the system
    metrics of the first node."""
    histograms_every: Count = 0
    """Steps between histograms of gradients; 0 sends none."""
    samples_every: Count = 0
    """Steps between samples (completions, guesses, attention maps, reconstructions) that are sent; 0 sends them at the
    end only."""
    prompt: str = "def main():\n"
    """Text that is continued at the end of the run and drawn as attention maps in the report."""
    energy: Energy = Energy()
