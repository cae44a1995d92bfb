"""The blocks of a job's model in the order in which a forward meets them, each with the tokens that it gets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from headway.parallel.context.layout import columns
from headway.parallel.mesh import Layout
from headway.parallel.pipeline.costs import Costs
from headway.parallel.pipeline.plan import Stage, chain_of, place_stages, split_evenly, stages_of
from headway.parallel.pipeline.rules import kind_of, virtual_stages
from headway.parallel.planner.activations import Kernel, Place
from headway.parallel.planner.spread import in_flight, of_rank
from headway.pretrain.config import Job, Model
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.mae import decoder_shape
from headway.pretrain.models.sizes import block_flops, end_flops

WIDE = {"fp64": 8}
NARROW = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2}  # in fp8 the backward reads bf16


@dataclass(frozen=True)
class Run:
    """What memory depends on, on the rank of a layout that has most of everything along all axes but the pipeline.

    Attributes:
        job: with `precision` resolved: fp32, fp64, bf16 or fp16.
        inputs: sizes that the data gives, of whole rows.
        rows: of a micro-batch on one rank.
        kernel: what computes self-attention.
        layout: ranks along each axis. With `shard` 1 replicas are DDP's; FSDP2 spreads what `shard` says over `context`
            too.
        device: `cpu` or `cuda`, on which the chunks of the loss depend.
        place: this rank's among the stages of a pipeline.
        micros: micro-batches of a step.
    """

    job: Job
    inputs: Inputs
    rows: int
    kernel: Kernel = "sdpa"
    layout: Layout = field(default_factory=Layout)
    device: str = "cpu"
    place: int = 0
    micros: int = 1

    @property
    def wide(self) -> int:
        """Bytes of a number of parameters, moments and the residual stream."""
        return WIDE.get(self.job.precision, 4)

    @property
    def narrow(self) -> int:
        """Bytes of a number in products."""
        return NARROW[self.job.precision]

    @property
    def cut(self) -> int:
        """Ranks over which places are cut between products."""
        return self.layout.tensor if self.job.parallel.sequence else 1

    @property
    def spread(self) -> int:
        """Ranks over which FSDP2 spreads parameters."""
        return self.layout.shard * self.layout.context

    @property
    def copied(self) -> bool:
        """Whether FSDP2 sums the gradients of replicas: DDP does where nothing but rows differs."""
        return (
            self.layout.replicate > 1 and self.layout.tensor * self.layout.context * self.layout.pipeline > 1
        )

    @property
    def gathers(self) -> bool:
        """Whether FSDP2 gathers parameters."""
        return self.spread > 1 or self.copied

    @property
    def whole(self) -> Run:
        """The same where heads, widths and rows are not cut."""
        return replace(self, layout=replace(self.layout, tensor=1, context=1))

    @property
    def flight(self) -> int:
        """Micro-batches whose activations are alive at once."""
        if self.layout.pipeline == 1:
            return 1
        return in_flight(self.job.parallel.schedule, self.layout.pipeline, self.place, self.micros)


def places(run: Run) -> list[Place]:
    """Every use of a block that this rank makes, in order of execution."""
    if run.layout.pipeline == 1:
        return [p for tower in towers(run) for p in tower]
    found: list[Place] = []
    for tower, uses in zip(towers(run), held(run), strict=True):
        for use in uses:
            shared = sum(tower[other].layer == tower[use].layer for other in uses)
            found.append(replace(tower[use], uses=shared))
    return found


def held(run: Run) -> list[list[int]]:
    """Of each tower, the uses of blocks that this rank of the pipeline makes."""
    whole = towers(run.whole)
    stages, owners = _stages(run, whole)
    spans = [stage.spans for stage in stages if owners[stage.number] == run.place]
    return [sorted(use for span in spans if i in span for use in range(*span[i])) for i in range(len(whole))]


def ends(run: Run) -> tuple[bool, bool]:
    """Whether the embedding is on this rank, and whether heads and loss are."""
    if run.layout.pipeline == 1:
        return True, True
    stages, owners = _stages(run, towers(run.whole))
    return owners[0] == run.place, owners[len(stages) - 1] == run.place


def _stages(run: Run, whole: list[list[Place]]) -> tuple[list[Stage], list[int]]:
    """Stages, cut by cost as `pipeline.plan.make_plan` does it, and the rank of each."""
    embedding, head = end_flops(run.job, run.inputs)
    blocks = [[block_flops(p.model, p.layer, p.length, p.causal, p.memory) for p in t] for t in whole]
    if run.job.objective.name == "mae":
        head -= sum(blocks[1])
    kind, count = kind_of(run.job), run.layout.pipeline * virtual_stages(run.job)
    sizes = split_evenly(chain_of(Costs(embedding, blocks, head)), count)
    stages = stages_of(sizes, [len(tower) for tower in whole])
    return stages, place_stages(count, run.layout.pipeline, kind.v_shaped)


def towers(run: Run) -> list[list[Place]]:
    """Every use of every block of each tower, in order of execution."""
    job, inputs = run.job, run.inputs
    m, separated = job.model, job.data.documents == "isolate"
    if m.family == "gpt":
        separated = separated or job.objective.name == "prefix"
        return [_tower(run, m, m.layers, inputs.length, separated=separated)]
    if m.family == "bert":
        padded = separated or job.objective.masking.pairs != "none"
        return [_tower(run, m, m.layers, inputs.length, causal=False, separated=padded)]
    if m.family == "t5":
        padded = job.objective.name in ("ul2", "pairs", "prefix")  # spans fill their rows
        t, s = inputs.target_length, inputs.length
        return [
            _tower(run, m, m.layers, s, causal=False, separated=padded),
            _tower(run, m, m.decoder_depth, t, memory=s, separated=padded),
        ]
    patches = (inputs.image // m.vision.patch) ** 2
    first = m.vision.prefix_tokens
    if job.objective.name == "mae":
        small, seen = decoder_shape(m, job.objective.mae), max(1, int(patches * (1 - job.objective.mae.rate)))
        return [
            _tower(run, m, m.layers, seen + first, causal=False),
            _tower(run, small, small.layers, patches + first, causal=False),
        ]
    found = _tower(run, m, m.layers, patches + first, causal=False)
    whole = m.has_experts(m.layers - 1) or m.attention.entropy_penalty or job.objective.pool != "first"
    if (
        not whole and run.cut == 1 and run.layout.context == 1
    ):  # a classifier's last block computes the tokens before the patches alone
        found[-1] = replace(found[-1], outputs=first)
    return [found]


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
            of_rank(model, run.layout.tensor),
            run.rows,
            columns(length, run.layout.context, 0),
            layer=i // (layers // unique),
            uses=layers // unique,
            memory=columns(memory, run.layout.context, 0) if memory else 0,
            causal=causal,
            separated=separated,
            kernel=run.kernel,
            wide=run.wide,
            narrow=run.narrow,
            tensor=run.layout.tensor,
            cut=run.cut,
            context=run.layout.context,
            ring=run.job.parallel.context_method == "ring",
        )
        for i in range(layers)
    ]
