"""Where a model is cut: stages of nearly equal cost, who holds them, and which parameters each needs."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from torch import Tensor, nn

from headway.parallel.mesh import Layout
from headway.parallel.pipeline.costs import Costs, costs_of
from headway.parallel.pipeline.rules import kind_of, virtual_stages
from headway.pretrain.config import Job
from headway.pretrain.models.transformer import Stack
from headway.pretrain.objectives import Objective

TABLE = "model.embed.tokens.weight"


@dataclass(frozen=True)
class Stage:
    """A part of the chain of blocks.

    Attributes:
        number: its place among all stages.
        spans: tower -> uses of its blocks that are made here: the first, and the one after the last.
        last: whether heads and loss follow.
    """

    number: int
    spans: dict[int, tuple[int, int]]
    last: bool

    @property
    def start(self) -> tuple[int, int]:
        """Tower and use where it begins."""
        tower = min(self.spans)
        return tower, self.spans[tower][0]


@dataclass
class Plan:
    """A whole objective, cut into stages.

    Attributes:
        whole: the objective before it was cut, on the meta device.
        towers: names of its towers.
        uses: of blocks, of each tower.
        repeats: how often in a row each tower uses a block.
        tied: whether the head reads the table of tokens.
        stages: in order.
        places: of every stage, the rank of the pipeline that holds it.
    """

    whole: Objective
    towers: tuple[str, ...]
    uses: list[int]
    repeats: list[int]
    tied: bool
    stages: list[Stage]
    places: list[int]
    holders: dict[str, list[int]] = field(default_factory=dict)
    """Name of a parameter or buffer -> ranks of the pipeline that hold it, in order."""

    def __post_init__(self) -> None:
        for name in tensors_of(self.whole):
            held = {self.places[s.number] for s in self.stages if self.needs(s, name)}
            self.holders[name] = sorted(held)

    def needs(self, stage: Stage, name: str) -> bool:
        """Whether a stage reads a parameter or buffer."""
        if self.tied and stage.last and name == TABLE:
            return True
        tower = next((i for i, prefix in enumerate(self.towers) if name.startswith(prefix + ".")), None)
        if tower is None:  # of the objective, or the embedding that two towers share
            starts = any(first == 0 for first, _ in stage.spans.values())
            return starts if name.startswith("model.embed.") else stage.last
        kind, _, rest = name.removeprefix(self.towers[tower] + ".").partition(".")
        if kind not in ("blocks", "relative", "norm", "embed", "mask_token"):
            return stage.last
        if tower not in stage.spans:
            return False
        first, stop = stage.spans[tower]
        if kind == "blocks":
            block, repeats = int(rest.partition(".")[0]), self.repeats[tower]
            return first < (block + 1) * repeats and block * repeats < stop
        return {"relative": True, "norm": stop == self.uses[tower]}.get(kind, first == 0)

    def at(self, place: int) -> list[Stage]:
        """The stages of a rank of the pipeline."""
        return [s for s in self.stages if self.places[s.number] == place]

    def prune(self, objective: Objective, place: int) -> None:
        """Take from an objective what a rank does not need: blocks, and the tensors of other modules.

        What stays keeps its name. Modules without blocks stay as shells without parameters.
        """
        for path, module in list(objective.named_modules()):
            if isinstance(module, Stack):
                for number in list(module._modules):
                    if not any(
                        place in held
                        for name, held in self.holders.items()
                        if name.startswith(f"{path}.{number}.")
                    ):
                        del module._modules[number]
        for path, module in objective.named_modules():
            for tensors in (module._parameters, module._buffers):
                for name in tensors:
                    if place not in self.holders.get(f"{path}.{name}".lstrip("."), [place]):
                        tensors[name] = None


def make_plan(objective: Objective, job: Job, layout: Layout) -> Plan:
    """Cut a whole objective, built on the meta device."""
    towers = [objective.get_submodule(name) for name in objective.towers]
    stacks = [tower.get_submodule("blocks") for tower in towers]
    assert all(isinstance(stack, Stack) for stack in stacks)
    uses, repeats = [[getattr(s, what) for s in stacks] for what in ("uses", "repeats")]
    count, kind = layout.pipeline * virtual_stages(job), kind_of(job)
    sizes = split_evenly(chain_of(costs_of(objective, job)), count)
    stages = stages_of(sizes, uses)
    places = place_stages(count, layout.pipeline, kind.v_shaped)
    tied = job.model.tied and hasattr(objective, "head_weight")
    return Plan(copy.deepcopy(objective), objective.towers, uses, repeats, tied, stages, places)


def chain_of(costs: Costs) -> list[float]:
    """Costs of the uses of blocks, in order; what stands before, between and behind goes with its neighbour."""
    chain = [cost for tower in costs.blocks for cost in tower]
    chain[0] += costs.embedding
    chain[-1] += costs.head
    return chain


def split_evenly(costs: Sequence[float], parts: int) -> list[int]:
    """Lengths of contiguous parts, none empty, of which the dearest costs least; among these, the evenest.

    Dynamic programming over prefixes; `costs` are as many as `parts` at least.
    """
    sums = [0.0, *accumulate(costs)]
    best: list[tuple[float, float, list[int]]] = [
        (cost, cost * cost, [end]) for end, cost in enumerate(sums) if end
    ]
    for part in range(1, parts):
        found = []
        for end in range(part + 1, len(sums)):
            options = []
            for start in range(part, end):
                worst, squares, lengths = best[start - part]
                cost = sums[end] - sums[start]
                options.append((max(worst, cost), squares + cost * cost, [*lengths, end - start]))
            found.append(min(options))
        best = found
    return best[-1][2]


def stages_of(sizes: Iterable[int], uses: Sequence[int]) -> list[Stage]:
    """Stages of so many uses of blocks each, over towers one after the other."""
    begins = [0, *accumulate(uses)]
    stops = list(accumulate(sizes))
    stages = []
    for number, (first, stop) in enumerate(zip([0, *stops], stops, strict=False)):
        spans = {}
        for tower, begin in enumerate(begins[:-1]):
            here = max(first, begin) - begin, min(stop, begins[tower + 1]) - begin
            if here[0] < here[1]:
                spans[tower] = here
        stages.append(Stage(number, spans, number == len(stops) - 1))
    return stages


def place_stages(count: int, ranks: int, v_shaped: bool) -> list[int]:
    """The rank of every stage: 0 1 2 0 1 2, or 0 1 2 2 1 0."""
    if v_shaped:
        return [*range(ranks), *reversed(range(ranks))]
    return [stage % ranks for stage in range(count)]


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name."""
    return dict(module.state_dict(keep_vars=True))
