"""The blocks of a job's model in the order in which a forward meets them, each with the tokens that it gets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from headway.parallel.planner.activations import Kernel, Place
from headway.pretrain.config import Job, Model
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.mae import decoder_shape

WIDE = {"fp64": 8}
NARROW = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Run:
    """What memory depends on.

    Attributes:
        job: with `precision` resolved: fp32, fp64, bf16 or fp16.
        inputs: sizes that the data gives.
        rows: of a micro-batch on one rank.
        kernel: what computes self-attention.
        shard: ranks over which parameters, gradients and moments are spread (FSDP2).
        replicate: ranks that hold the same; with `shard` 1, DDP.
        device: `cpu` or `cuda`, on which the chunks of the loss depend.
    """

    job: Job
    inputs: Inputs
    rows: int
    kernel: Kernel = "sdpa"
    shard: int = 1
    replicate: int = 1
    device: str = "cpu"

    @property
    def wide(self) -> int:
        """Bytes of a number of parameters, moments and the residual stream."""
        return WIDE.get(self.job.precision, 4)

    @property
    def narrow(self) -> int:
        """Bytes of a number in products."""
        return NARROW[self.job.precision]


def places(run: Run) -> list[Place]:
    """Every use of every block, in order of execution."""
    job, inputs = run.job, run.inputs
    m, separated = job.model, job.data.documents == "isolate"
    if m.family == "gpt":
        return _tower(run, m, m.layers, inputs.length, separated=separated or job.objective.name == "prefix")
    if m.family == "bert":
        padded = separated or job.objective.masking.pairs != "none"
        return _tower(run, m, m.layers, inputs.length, causal=False, separated=padded)
    if m.family == "t5":
        padded = job.objective.name in ("spans", "ul2", "pairs")
        encoder = _tower(run, m, m.layers, inputs.length, causal=False, separated=padded)
        memory = inputs.length
        return encoder + _tower(
            run, m, m.decoder_depth, inputs.target_length, memory=memory, separated=padded
        )
    patches = (inputs.image // m.vision.patch) ** 2
    first = int(m.vision.class_token)
    if job.objective.name == "mae":
        small, seen = decoder_shape(m, job.objective.mae), max(1, int(patches * (1 - job.objective.mae.rate)))
        encoder = _tower(run, m, m.layers, seen + first, causal=False)
        return encoder + _tower(run, small, small.layers, patches + first, causal=False)
    found = _tower(run, m, m.layers, patches + first, causal=False)
    whole = m.has_experts(m.layers - 1) or m.attention.entropy_penalty or job.objective.pool != "first"
    if not whole:  # a classifier's last block computes the class token alone
        found[-1] = replace(found[-1], outputs=1)
    return found


def _tower(
    run: Run,
    model: Model,
    layers: int,
    length: int,
    *,
    causal: bool = True,
    memory: int = 0,
    separated: bool = False,
) -> list[Place]:
    unique = min(layers, model.unique_layers or layers)
    return [
        Place(
            model,
            run.rows,
            length,
            layer=i // (layers // unique),
            uses=layers // unique,
            memory=memory,
            causal=causal,
            separated=separated,
            kernel=run.kernel,
            wide=run.wide,
            narrow=run.narrow,
        )
        for i in range(layers)
    ]
