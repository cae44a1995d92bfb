"""Where ZeRO keeps a parameter's fp32 weights, moments and gradient on this rank: as live views, whatever the stage.

ZeRO lays parameters end to end in flat buffers and gives each rank a part (Rajbhandari et al. 2020). A parameter then
has at most one run of neighbouring elements on a rank: `numel` elements from `start` in the parameter, from `at` in
the rank's flat buffer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headway.pretrain.optim.build import allocate_state

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of AdamW, as its state names them."""


class Run(NamedTuple):
    """A parameter's elements on this rank.

    Attributes:
        flat: which buffer.
        at: where in it.
        start: where in the parameter, flattened.
        numel: how many; 0 if the rank has none.
    """

    flat: int
    at: int
    start: int
    numel: int


class Flats(ABC):
    """The flat buffers of a rank.

    Args:
        engine: DeepSpeed's.
        named: canonical name -> parameter, of all that it trains.

    Attributes:
        masters: fp32 weights, a flat buffer each; the keys of the optimizer's state.
        runs: of every parameter.
    """

    masters: list[Tensor]
    runs: dict[str, Run]

    def __init__(self, engine: Any, named: Mapping[str, Tensor]) -> None:
        self.engine, self.named = engine, named
        self.optimizer: Any = engine.optimizer
        self.runs = self._find()

    @abstractmethod
    def _find(self) -> dict[str, Run]:
        """Fill in `masters`, and find the runs in them."""

    @abstractmethod
    def gradients(self) -> dict[str, Tensor]:
        """Reduced gradients, not clipped, as runs; between the last backward of a step and the step. Live."""

    @abstractmethod
    def forget(self) -> None:
        """Drop gradients; harmless where a step has done so."""

    @abstractmethod
    def refresh(self) -> None:
        """Make narrow and gathered copies follow the masters, which were written. Collective."""

    def moved(self) -> None:  # noqa: B027  (most have no copies)
        """A step has moved weights and moments: copies of them are of no use any more."""

    @property
    def inner(self) -> torch.optim.Optimizer:
        """torch's optimizer, which moves the masters."""
        found: torch.optim.Optimizer = self.optimizer.optimizer
        return found

    def weight(self, name: str) -> Tensor:
        """This rank's run of the fp32 weights."""
        run = self.runs[name]
        return self.masters[run.flat].detach().view(-1)[run.at : run.at + run.numel]

    def moment(self, name: str, key: str) -> Tensor:
        """This rank's run of a moment."""
        run = self.runs[name]
        flat: Tensor = self.inner.state[self.masters[run.flat]][key]
        return flat.view(-1)[run.at : run.at + run.numel]

    def step(self, name: str) -> Tensor:
        """The count of updates that the optimizer keeps for the buffer in which a parameter lies, 0-dim."""
        found: Tensor = self.inner.state[self.masters[self.runs[name].flat]]["step"]
        return found

    def entries(self, name: str) -> dict[str, Tensor]:
        """What the optimizer keeps for a parameter."""
        return {"step": self.step(name)} | {key: self.moment(name, key) for key in MOMENTS}

    def follows(self, name: str, entry: Tensor) -> bool:
        """Whether an entry has a number for each of the parameter's numbers here."""
        return entry.dim() > 0

    def allocate(self) -> None:
        """Make all moments now, zero, so that a checkpoint can be read into them."""
        for flat in self.masters:
            state = self.inner.state[flat]
            if not state:
                fused = bool(self.inner.defaults.get("fused"))
                state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device if fused else "cpu")
                for key in MOMENTS:
                    state[key] = torch.zeros_like(flat, memory_format=torch.preserve_format)


class Whole(Flats):
    """Stage 0: every parameter is a buffer of its own, which all ranks have."""

    @property
    def inner(self) -> torch.optim.Optimizer:
        found: torch.optim.Optimizer = self.optimizer
        return found

    def _find(self) -> dict[str, Run]:
        self.masters = list(self.named.values())
        return {name: Run(i, 0, 0, p.numel()) for i, (name, p) in enumerate(self.named.items())}

    def entries(self, name: str) -> dict[str, Tensor]:
        return dict(self.inner.state[self.named[name]])

    def follows(self, name: str, entry: Tensor) -> bool:
        return entry.shape == self.named[name].shape and entry.dim() > 0

    def allocate(self) -> None:
        allocate_state(self.inner)

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad.view(-1) for name, p in self.named.items() if p.grad is not None}

    def forget(self) -> None:
        for p in self.named.values():
            p.grad = None

    def refresh(self) -> None:
        """There is one copy only."""


class Shards(Flats):
    """Stages 1 and 2: parameters are whole, the rest is cut."""

    def _find(self) -> dict[str, Run]:
        names = {id(p): name for name, p in self.named.items()}
        self.masters = list(self.optimizer.single_partition_of_fp32_groups)
        runs = {}
        for i, parameters in enumerate(self.optimizer.round_robin_bit16_groups):
            size = self.masters[i].numel()
            begin = size * self.optimizer.real_dp_process_group[i].rank()
            for p, offset in zip(parameters, self.optimizer.round_robin_bit16_offsets[i], strict=True):
                first, stop = max(offset, begin), min(offset + p.numel(), begin + size)
                if first < stop:
                    runs[names[id(p)]] = Run(i, first - begin, first - offset, stop - first)
                else:
                    runs[names[id(p)]] = Run(i, 0, 0, 0)
        return runs

    def gradients(self) -> dict[str, Tensor]:
        if self.optimizer.cpu_offload:
            flats: Any = [flat.grad for flat in self.masters]
            return {name: flats[run.flat][run.at :][: run.numel] for name, run in self.runs.items()}
        found = {name: self.masters[0].new_empty(0) for name in self.named}
        names = {id(p): name for name, p in self.named.items()}
        for i, parts in self.optimizer.averaged_gradients.items():
            real = [part for part in parts if not getattr(part, "_zero_padding", False)]
            for p, part in zip(self.optimizer.params_in_partition[i], real, strict=False):
                found[names[id(p)]] = part.view(-1)
        return found

    def forget(self) -> None:
        optimizer = self.optimizer
        optimizer.zero_grad(set_to_none=True)
        optimizer.micro_step_id = -1
        for i in range(len(self.masters)):
            optimizer.averaged_gradients[i] = None
            optimizer.all_grad_tensors[i] = None
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()

    def refresh(self) -> None:
        self.optimizer.update_lp_params()


class NarrowShards(Flats):
    """Stage 1 in bf16, which DeepSpeed has another optimizer for."""

    def _find(self) -> dict[str, Run]:
        self.masters = list(self.optimizer.fp32_groups_flat_partition)
        runs = {}
        groups = {id(p): i for i, group in enumerate(self.optimizer.bf16_groups) for p in group}
        for name, p in self.named.items():
            mapping = p._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                runs[name] = Run(groups[id(p)], 0, 0, 0)
            else:
                high, low = mapping.hp_fragment_address, mapping.lp_fragment_address
                runs[name] = Run(groups[id(p)], high.start, low.start, high.numel)
        return runs

    def gradients(self) -> dict[str, Tensor]:
        flats = self.optimizer.fp32_groups_gradient_flat_partition
        return {name: flats[run.flat][run.at :][: run.numel] for name, run in self.runs.items()}

    def forget(self) -> None:
        self.optimizer.clear_hp_grads()
        self.optimizer.clear_lp_grads(set_to_none=True)

    def refresh(self) -> None:
        self.optimizer.update_lp_params()


class Parts(Flats):
    """Stage 3: parameters are cut one by one, into parts as long as each other, of which the last may be padding."""

    def _find(self) -> dict[str, Run]:
        self.masters = list(self.optimizer.fp32_partitioned_groups_flat)
        runs = {}
        for name, p in self.named.items():
            flat, at, size = self.optimizer.grad_position[self.optimizer.get_param_id(p)]
            start = size * self.optimizer._get_param_partition_rank(p)
            count = max(0, min(size, p.ds_numel - start))  # type: ignore[attr-defined]
            runs[name] = Run(flat, at, start if count else 0, count)
        return runs

    def gradients(self) -> dict[str, Tensor]:
        if self.optimizer.offload_optimizer:
            flats: Any = [flat.grad for flat in self.masters]
            return {name: flats[run.flat][run.at :][: run.numel] for name, run in self.runs.items()}
        found = {}
        names = {id(p): name for name, p in self.named.items()}
        for i, parts in self.optimizer.averaged_gradients.items():
            for p, part in zip(self.optimizer.fp16_groups[i], parts, strict=True):
                found[names[id(p)]] = part.view(-1)[: self.runs[names[id(p)]].numel]
        return found

    def forget(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def refresh(self) -> None:
        optimizer = self.optimizer
        optimizer._partition_all_parameters()
        for i in range(len(self.masters)):
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        self._regather()

    def _regather(self) -> None:
        if kept := self.optimizer.persistent_parameters:  # small ones, which are never cut for long
            kept[0].all_gather(kept)
        self.optimizer.invalidate_secondary_tensor()
