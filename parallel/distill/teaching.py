"""A frozen teacher at a layout of its own: its forward, and what it shows of it.

Shapes: B batch, S sequence, E hidden size, V vocabulary, k words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from headway.kernels.cross_entropy import chunk_rows
from headway.parallel import expert
from headway.parallel.apply import blocks_of, local_slice
from headway.parallel.context.apply import slicer_of, spread
from headway.parallel.mesh import World
from headway.parallel.tensor.split import split
from headway.pretrain.config import Job
from headway.pretrain.engine import Batch
from headway.pretrain.models.init import initialise
from headway.pretrain.models.layers import narrowed
from headway.pretrain.objectives import Objective
from headway.pretrain.objectives.classify import Classifier
from headway.pretrain.objectives.distill import names
from headway.pretrain.objectives.distill.distillation import DOCUMENTS, Wanted
from headway.pretrain.objectives.distill.show import ask, collect, install


class Teaching(nn.Module):
    """A teacher's forward over this rank's rows, and the columns and heads that are its.

    Attributes:
        words: (logits of some rows, k, temperature) -> values, numbers and log-sum-exp; over all ranks that share a
            vocabulary.
    """

    def __init__(self, objective: Objective, world: World, temperature: float) -> None:
        super().__init__()
        self.objective = objective
        self.slicer = slicer_of(objective, world) if world.layout.context > 1 else None
        self.temperature = temperature
        self.words: Callable[..., tuple[Tensor, Tensor, Tensor]] = likeliest

    def forward(self, batch: Batch, wanted: Wanted) -> Batch:
        """Everything that is wanted, by name."""
        objective = self.objective
        columns: Any = {}
        whole = batch
        if self.slicer is not None:
            batch, _, columns = self.slicer.before(objective, (batch,))
        ask(objective, wanted.targets)
        if isinstance(objective, Classifier) and (wanted.targets or wanted.last or wanted.others):
            objective.outputs = None
        found: Batch = {}
        hidden = None
        for tower in range(len(objective.towers)):
            before = None if hidden is None else hidden.final
            hidden = objective.through(tower, batch, None, before, columns=columns)
            found |= collect(tower, hidden, wanted.targets)
        assert hidden is not None
        if wanted.last:
            found[names.LAST] = hidden.final
        if wanted.others:
            found[names.OTHERS] = self._mean(hidden.final, whole)
        return found | self._predicted(hidden.final, wanted)

    def attention_maps(self, batch: Batch) -> Tensor:
        """Of all layers that have some, whole on every rank, [layers, B, H, S, S]. Collective, of equal batches."""
        return self.objective.attention_maps(batch)

    def _predicted(self, final: Tensor, wanted: Wanted) -> Batch:
        if wanted.classes:
            assert isinstance(self.objective, Classifier)
            return {names.LOGITS: self.objective.of(final)}
        if not (wanted.final or wanted.top):
            return {}
        read_BSE = narrowed(self.objective.read(final))
        if wanted.final:
            return {names.FINAL: read_BSE}
        assert wanted.top is not None
        values, words, rest = self._top(read_BSE.flatten(0, 1), wanted.top)
        shape = read_BSE.shape[:2]
        return {
            names.LOGITS: values.view(*shape, -1),
            names.WORDS: words.view(*shape, -1),
            names.REST: rest.view(shape),
        }

    def _top(self, rows_NE: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Likeliest words of every row, in chunks of rows: logits are never whole."""
        weight: Any = self.objective.head_weight
        bias = self.objective.head_bias
        step = chunk_rows(weight.shape[0], 4, rows_NE.device.type)
        parts = [
            self.words(nn.functional.linear(rows_NE[i : i + step], weight, bias), k, self.temperature)
            for i in range(0, len(rows_NE), step)
        ]
        values, words, rest = (torch.cat(column) for column in zip(*parts, strict=True))
        return values, words, rest

    def _mean(self, final_BSE: Tensor, batch: Batch) -> Tensor:
        """Mean of a row's last hidden states over the places that count, [B, E]."""
        documents = batch.get(DOCUMENTS[len(self.objective.towers) - 1])
        team = self.slicer.team if self.slicer is not None and self.slicer.cut.sequences else None
        x_BSE = final_BSE.to(torch.promote_types(final_BSE.dtype, torch.float32))
        here = documents
        if documents is not None and team is not None:
            here = torch.cat([documents[:, run.start : run.stop] for run in team.runs(documents.shape[1])], 1)
        counted_BS = x_BSE.new_ones(x_BSE.shape[:2]) if here is None else (here >= 0).to(x_BSE.dtype)
        sums_BE, counts_B = (x_BSE * counted_BS[..., None]).sum(1), counted_BS.sum(1, keepdim=True)
        if team is not None:
            sums_BE, counts_B = team.sum(sums_BE), team.sum(counts_B)
        return sums_BE / counts_B.clamp(min=1)


def likeliest(logits_NV: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest logits of every row and their numbers [N, k], and the log-sum-exp over the temperature [N]."""
    wide = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    values, words = wide.topk(k, 1)
    return values, words, (wide / temperature).logsumexp(1)


def freeze(objective: Objective, job: Job, world: World, temperature: float) -> Teaching:
    """Spread a teacher that was built on the meta device, and give it memory; its weights mean nothing yet.

    As `parallel.apply.apply`, without what training alone needs. Weights are fp32 (fp64 for fp64) until they are there.
    """
    install(objective)
    if world.layout.tensor > 1:
        split(objective, job, world)
    if world.layout.context > 1:
        spread(objective, job, world)
    expert.spread(objective, world)
    objective.requires_grad_(False)
    teaching = Teaching(objective, world, temperature)
    if world.layout.tensor > 1 and hasattr(objective, "head_weight"):
        teaching.words = _over_ranks(objective, world)
    if world.layout.shard > 1:
        shard(teaching, world)
    teaching.to_empty(device=world.device)
    initialise(objective, job.model, job.train.seed, slice_of=local_slice)
    return teaching.eval()


def shard(teaching: Teaching, world: World) -> None:
    """FSDP2 of a teacher: a block's weights are whole while it computes, and no longer."""
    assert world.mesh is not None
    mesh, policy = world.mesh["shard"], MixedPrecisionPolicy()
    for block in blocks_of(teaching.objective):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(teaching, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(teaching, "attention_maps")


def _over_ranks(objective: Objective, world: World) -> Any:
    """`likeliest` where each rank has the logits of some words."""
    table: Any = objective.get_submodule("model.embed.tokens")
    first: int = table.first
    group = world.group("tensor")

    def words(logits_NV: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        values, numbers, lse = likeliest(logits_NV, min(k, logits_NV.shape[1]), temperature)
        ranks = world.layout.tensor
        width = -(-table.num_embeddings // ranks)
        pad = min(k, width) - values.shape[1]
        mine = torch.cat(
            (
                nn.functional.pad(values, (0, pad), value=-torch.inf),
                nn.functional.pad(numbers + first, (0, pad)).to(values.dtype),
                lse[:, None],
            ),
            1,
        )
        every = [torch.empty_like(mine) for _ in range(ranks)]
        torch.distributed.all_gather(every, mine.contiguous(), group=group)
        count = min(k, width)
        all_values = torch.cat([part[:, :count] for part in every], 1)
        all_numbers = torch.cat([part[:, count : 2 * count] for part in every], 1)
        best, at = all_values.topk(k, 1)
        together = torch.stack([part[:, -1] for part in every]).logsumexp(0)
        return best, all_numbers.gather(1, at).to(torch.int64), together

    return words
