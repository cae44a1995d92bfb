"""Tensor parallelism of an objective: parameters become DTensors as the plan says, modules play their parts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from headway.kernels.cross_entropy import chunk_rows
from headway.parallel.mesh import World
from headway.parallel.parts import Part, mark
from headway.parallel.tensor import modules as roles
from headway.parallel.tensor.collectives import Columns, enter
from headway.parallel.tensor.vocabulary import row_loss_over, soft_row_loss_over
from headway.pretrain.config import Job
from headway.pretrain.errors import JobError
from headway.pretrain.models.attention import Attention
from headway.pretrain.models.layers import MLP
from headway.pretrain.models.moe import MoE
from headway.pretrain.models.plan import cut_of, per_head
from headway.pretrain.models.spectral import SpectralLinear
from headway.pretrain.models.taps import Tap
from headway.pretrain.models.transformer import Stack
from headway.pretrain.objectives import Objective
from headway.pretrain.objectives.base import ChunkedLoss
from headway.pretrain.objectives.distill.match import Match


def split(objective: Objective, job: Job, world: World, *, plain: bool = False) -> None:
    """Cut an objective on the meta device over the tensor axis.

    Args:
        plain: parameters become plain tensors that are marked as parts (`parallel.parts`), not DTensors. Of whole ones
            whose gradient is a sum over ranks `tensor_share` is true; nobody has summed it yet.

    Raises:
        JobError: a rank would have no words or no features.
    """
    assert world.mesh is not None
    cutter = Cutter(objective, world, spread_experts=world.layout.expert > 1, plain=plain)
    words = isinstance(getattr(objective, "loss", None), ChunkedLoss)
    if job.parallel.sequence:
        cutter.cut_sequences(objective)
    for name, module in list(objective.named_modules()):
        cutter.parameters(module, name, words)
    for module in list(objective.modules()):
        cutter.role(module)
    if words:
        cutter.words(objective, job)
    cutter.whole_results(objective)


class Cutter:
    """What is known of the tensor axis while an objective is cut."""

    def __init__(self, objective: Objective, world: World, *, spread_experts: bool, plain: bool) -> None:
        assert world.mesh is not None
        self.plain = plain
        self.mesh, self.ranks, self.rank = world.mesh["tensor"], world.layout.tensor, world.place("tensor")
        self.group = self.mesh.get_group().group_name
        self.spread_experts = spread_experts
        self.attentions = [m for m in objective.modules() if isinstance(m, Attention)]
        self.copied = {layer for m in self.attentions for layer in (m.k, m.v) if _heads(m, m.k) % self.ranks}
        self.whole_heads = _heads(self.attentions[0], self.attentions[0].q)
        # Of modules in blocks that are called on a part of the sequence.
        self.columns: dict[nn.Module, Columns] = {}

    def cut_sequences(self, objective: Objective) -> None:
        """Say which modules see a part of the sequence: those of blocks, but for what experts own."""
        for stack in [m for m in objective.modules() if isinstance(m, Stack)]:
            columns = Columns(self.group, self.ranks, self.rank)
            self.columns[stack] = columns
            experts = {
                m for moe in stack.modules() if isinstance(moe, MoE) for m in moe.modules() if m is not moe
            }
            taps = [m for m in stack.modules() if isinstance(m, Tap)]
            alike = {m for tap in taps for m in tap.modules() if m is not tap}  # they read whole streams
            self.columns |= {m: columns for m in stack.modules() if m not in experts | alike}

    def parameters(self, module: nn.Module, prefix: str, words: bool) -> None:
        """Make a module's own parameters DTensors, and the module one that reads its parts."""
        own = dict(module.named_parameters(recurse=False))
        if not own or (isinstance(module, MoE) and self.spread_experts):
            return
        shares = set()
        for key, parameter in own.items():
            name = f"{prefix}.{key}" if prefix else key
            dim = None if module in self.copied else cut_of(name, words)
            setattr(module, key, self._spread(name, parameter, dim))
            on_part = dim is None and module in self.columns and not isinstance(module, MoE)
            gain = key == "gain" and cut_of(f"{prefix}.weight", words) is not None  # of a part of the product
            if per_head(name) or module in self.copied or on_part or gain:
                shares.add(key)
        self._become(module, roles.Local, shares=frozenset(shares))
        self._mark_shares(module, shares)

    def _mark_shares(self, module: nn.Module, names: Iterable[str]) -> None:
        """Say which whole parameters have a share of their gradient here; of a DTensor its gradient says so."""
        for name in names:
            if self.plain and (parameter := module._parameters.get(name)) is not None:
                parameter.tensor_share = True  # type: ignore[attr-defined]

    def role(self, module: nn.Module) -> None:
        """What a module does beside reading its parts."""
        if isinstance(module, Attention):
            self._attention(module)
        elif isinstance(module, MLP):
            self._become(module, roles.Inner)
            self._linears(module.gate, module.up, rows=module.down)
        elif isinstance(module, Match):
            self._become(module, roles.Compared, ranks=self.ranks)
            module.heads //= self.ranks
        elif isinstance(module, Tap):
            self._become(module, roles.Streams)
        elif isinstance(module, Stack) and module in self.columns:
            self._become(module, roles.Cut)
        elif isinstance(module, MoE):
            if module in self.columns:
                self._become(module, roles.Experts)
            if not self.spread_experts:
                module.__dict__["shares"] = frozenset({"down_bias"})
                self._mark_shares(module, ["down_bias"])
                module.dispatcher = roles.Widths(module.dispatcher, self.group, self.rank)

    def words(self, objective: Any, job: Job) -> None:
        """The table of words, the head and the loss."""
        table, loss = objective.model.embed.tokens, objective.loss
        vocabulary = table.num_embeddings
        step = -(-vocabulary // self.ranks)
        if step * (self.ranks - 1) >= vocabulary:
            rule = f"a vocabulary of {vocabulary} leaves a rank without words"
            raise JobError("parallel.tensor", self.ranks, rule, max(1, self.ranks // 2))
        first = step * self.rank
        self._become(table, roles.Words, first=first)
        loss.compute = row_loss_over(first, vocabulary, self.group)
        loss.compute_soft = soft_row_loss_over(first, self.group)
        device = "cuda" if self.mesh.device_type == "cuda" else "cpu"
        loss.chunk = loss.chunk or chunk_rows(step, 4, device)  # as many chunks on every rank
        group = self.group
        loss.register_forward_pre_hook(lambda _, given: (enter(given[0], group), *given[1:]))

    def whole_results(self, objective: Any) -> None:
        """What people ask of a model is whole: logits of all words, maps of all heads."""
        if hasattr(objective, "head_weight"):
            words = objective.model.embed.tokens.num_embeddings
            objective.logits = self._gathered(objective.logits, -1, words)
        objective.attention_maps = self._gathered(objective.attention_maps, 2, self.whole_heads)

    def _attention(self, module: Any) -> None:
        self._become(module, roles.Heads, ranks=self.ranks)
        module.first_head = _heads(module, module.q) // self.ranks * self.rank
        if module.k not in self.copied:
            self._linears(module.q, module.k, module.v, *module.gates.values(), rows=module.o)
            return
        self._linears(module.q, *module.gates.values(), rows=module.o)
        first = self.rank * _heads(module, module.k) // self.ranks * module.head_dim
        for layer in (module.k, module.v):
            self._become(layer, roles.Copies, rows=slice(first, first + module.head_dim))

    def _linears(self, *columns: Any, rows: Any) -> None:
        for layer in (layer for layer in columns if layer is not None):
            self._linear(layer, roles.Local, 0)
        self._linear(rows, roles.Rows, 1)

    def _linear(self, layer: Any, role: type, cut: int) -> None:
        self._become(layer, role)
        if isinstance(layer, SpectralLinear):
            step = -(-layer.out_features // self.ranks)
            starts = [step * i for i in range(1, self.ranks)]
            self._become(layer, roles.SpectralPart, cut=cut, starts=starts)

    def _spread(self, name: str, parameter: nn.Parameter, dim: int | None) -> nn.Parameter:
        if dim is not None:
            size = parameter.shape[dim]
            if -(-size // self.ranks) * (self.ranks - 1) >= size:
                rule = f"{name} has {size} rows to cut: a rank would have none"
                raise JobError("parallel.tensor", self.ranks, rule, 1)
        placement = Replicate() if dim is None else Shard(dim)
        local = parameter.data if dim is None else parameter.data.chunk(self.ranks, dim)[self.rank]
        fresh = torch.empty_like(local, memory_format=torch.contiguous_format)
        if self.plain:
            step = 0 if dim is None else -(-parameter.shape[dim] // self.ranks)
            offset = tuple(step * self.rank if d == dim else 0 for d in range(parameter.dim()))
            part = Part(tuple(parameter.shape), offset)
            return mark(nn.Parameter(fresh, parameter.requires_grad), part)
        return nn.Parameter(self._dtensor(fresh, placement, parameter), parameter.requires_grad)

    def _dtensor(self, local: Tensor, placement: Replicate | Shard, like: Tensor) -> DTensor:
        """A part as a DTensor of the shape of `like`."""
        return DTensor.from_local(
            local, self.mesh, [placement], run_check=False, shape=like.shape, stride=like.stride()
        )

    def _become(self, module: nn.Module, role: type, **facts: Any) -> None:
        columns = self.columns.get(module)
        roles.become(module, role, mesh=self.mesh, group=self.group, rank=self.rank, columns=columns, **facts)

    def _gathered(self, method: Any, dim: int, size: int) -> Any:
        """The method with its result's parts put together along a dim of `size`."""

        def whole(*args: Any, **kwargs: Any) -> Tensor:
            part: Tensor = method(*args, **kwargs)
            at = dim % part.dim()
            like = torch.empty([*part.shape[:at], size, *part.shape[at + 1 :]], device="meta")
            return self._dtensor(part.contiguous(), Shard(at), like).full_tensor()

        return whole


def _heads(attention: Attention, layer: nn.Linear) -> int:
    return layer.out_features // attention.head_dim
