"""ZeRO-3's fp32 weights and moments on disk, read and written as if they were in memory (ZeRO-Infinity, Rajbhandari et
al. 2021).

DeepSpeed keeps on disk what is 1 MiB or more of fp32 weights of a sub-group (`zero_optimization.sub_group_size`), and
steps one sub-group after the other in buffers that all share. What a checkpoint reads, and what is written when one
is loaded, are therefore copies in host memory, from the first that asks until the next step moves the originals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from headway.parallel.engines.deepspeed.flats import MOMENTS, Flats, NarrowShards, Parts, Run, Shards, Whole
from headway.pretrain.errors import JobError

WEIGHTS = "weights"
"""Of a copy, beside the names of moments."""

OFFLOAD = "parallel.deepspeed.config: zero_optimization.offload_optimizer"


class Swapped(Parts):
    """Stage 3 with optimizer state on disk.

    Gradients stay in host memory, where DeepSpeed accumulates them, and are read and clipped there. It would write them
    to disk as well for the step, and read those of 1 MiB and more back to wherever they begin in the sub-group: where
    that is no multiple of 512 bytes the disk refuses, nothing is raised, and the step takes what was in the buffer.

    Attributes:
        copies: flat buffer -> weights and moments of a sub-group that is on disk, for as long as they are its own.
    """

    def __init__(self, engine: Any, named: Mapping[str, Tensor]) -> None:
        self.copies: dict[int, dict[str, Tensor]] = {}
        super().__init__(engine, named)
        self.optimizer.optimizer_swapper.swap_out_gradients = self._keep_gradients

    def weight(self, name: str) -> Tensor:
        return self._run(name, WEIGHTS) if self._on_disk(name) else super().weight(name)

    def moment(self, name: str, key: str) -> Tensor:
        return self._run(name, key) if self._on_disk(name) else super().moment(name, key)

    def allocate(self) -> None:
        super().allocate()
        numbers = self.optimizer.fp16_partitioned_groups_flat_numel
        for flat, master in enumerate(self.masters):
            if self.optimizer._swappable_optimizer_subgroup(flat):
                with self._inside(flat, written=True):
                    for key in MOMENTS:
                        self.inner.state[master][key] = torch.zeros(int(numbers[flat]), dtype=master.dtype)

    def gradients(self) -> dict[str, Tensor]:
        found = {(flat, at): gradient for flat, at, gradient in self._accumulated()}
        return {
            name: found[run.flat, run.at][: run.numel]
            if self._on_disk(name)
            else self._gradient_in_memory(run)
            for name, run in self.runs.items()
        }

    def _gradient_in_memory(self, run: Run) -> Tensor:
        """Of a sub-group that is too small for the disk: what its step takes is a buffer of its own."""
        gradient = self.masters[run.flat].grad
        assert gradient is not None
        return gradient[run.at :][: run.numel]

    def moved(self) -> None:
        self.copies.clear()

    def refresh(self) -> None:
        """Writes to disk what was written into copies, too."""
        self.optimizer._partition_all_parameters()
        for flat in range(len(self.masters)):
            if not self.optimizer._swappable_optimizer_subgroup(flat):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(flat)
                continue
            with self._inside(flat, written=flat in self.copies) as tensors:
                for key, copy in self.copies.get(flat, {}).items():
                    tensors[key].copy_(copy)
                self.optimizer._reassign_or_swap_out_partitioned_parameters(flat)
        self._regather()

    def _on_disk(self, name: str) -> bool:
        return bool(self.optimizer._swappable_optimizer_subgroup(self.runs[name].flat))

    def _run(self, name: str, key: str) -> Tensor:
        """A parameter's run in the copy of its sub-group, which is read from disk if there is none."""
        run = self.runs[name]
        if run.flat not in self.copies:
            with self._inside(run.flat, written=False) as tensors:
                self.copies[run.flat] = {key: tensor.clone() for key, tensor in tensors.items()}
        return self.copies[run.flat][key][run.at : run.at + run.numel]

    @contextmanager
    def _inside(self, flat: int, *, written: bool) -> Iterator[dict[str, Tensor]]:
        """Within, a sub-group's weights and moments are in DeepSpeed's buffers; then on disk as before, or as they are
        now if they were written."""
        self.optimizer._optimizer_states_and_gradient_swap_in(flat)
        master = self.masters[flat]
        state = self.inner.state[master]
        yield {WEIGHTS: master.detach()} | {key: state[key] for key in MOMENTS if key in state}
        if written:
            self.optimizer._writeback_swap_state(flat, write_opt_state=True, write_gradients=False)
        else:
            self.optimizer._release_swap_buffers(flat)

    def _keep_gradients(self, parameter: Tensor, **gradients: Any) -> None:
        """In the stead of the swapper's method: what a sub-group's step takes is what has been accumulated."""
        flat = next(i for i, master in enumerate(self.masters) if master is parameter)
        self.optimizer.optimizer_swapper.swap_params_info[parameter.ds_id].unswapped_gradients = {  # type: ignore[attr-defined]
            at: gradient for i, at, gradient in self._accumulated() if i == flat
        }

    def _accumulated(self) -> Iterator[tuple[int, int, Tensor]]:
        """Of each parameter: which flat buffer, where in it, and what is accumulated of its gradient, with padding."""
        begin = 0
        for p in (p for group in self.optimizer.fp16_groups for p in group):
            flat, at, _ = self.optimizer.grad_position[self.optimizer.get_param_id(p)]
            size = p.partition_numel()
            yield flat, at, self.optimizer.grad_partitions_flat_buffer[begin : begin + size]
            begin += size


def read_once(parameters: Iterable[Any]) -> None:
    """Let DeepSpeed read a parameter from disk once where it looks ahead to two uses of it: of a tied weight, or by the
    end of the forward and the beginning of the backward. It would ask for a second buffer, and fail."""
    swappers = {id(found): found for p in parameters if (found := getattr(p, "nvme_swapper", None))}
    for swapper in swappers.values():
        swapper.swap_in = _each_once(swapper.swap_in)


def _each_once(swap_in: Callable[..., None]) -> Callable[..., None]:
    @wraps(swap_in)
    def each_once(parameters: list[Any], *args: Any, **kwargs: Any) -> None:
        swap_in(list({id(p): p for p in parameters}.values()), *args, **kwargs)

    return each_once


def check_disk(zero: Mapping[str, Any], *, possible: Callable[[], bool]) -> None:
    """Raise JobError if something is to be kept on NVMe and files cannot be read beside the computation, or if the
    buffers of a step are still in use after it.

    Args:
        zero: `zero_optimization` of a job's JSON.
        possible: whether DeepSpeed's `async_io` is there or can be built.
    """
    for key, field in (("offload_optimizer", "offload_optimizer"), ("offload_param", "offload_parameters")):
        if zero.get(key, {}).get("device") == "nvme" and not possible():
            rule = "DeepSpeed's async_io cannot be built here: it needs libaio and its headers"
            raise JobError(f"parallel.deepspeed.{field}", "nvme", rule, "cpu")
    refused = dict.fromkeys(
        ("pipeline_read", "pipeline_write"), "checkpoints read the state while DeepSpeed still writes it"
    )
    refused["fast_init"] = "it reads weights to places in memory that the disk may refuse, and raises nothing"
    for key, rule in refused.items():
        if zero.get("offload_optimizer", {}).get("device") == "nvme" and zero["offload_optimizer"].get(key):
            raise JobError(f"{OFFLOAD}.{key}", True, rule, False)


def flats_of(engine: Any, named: Mapping[str, Tensor]) -> Flats:
    """The flat buffers of DeepSpeed's engine."""
    kinds: dict[str, type[Whole | Shards | NarrowShards | Parts]] = {
        "DeepSpeedZeroOptimizer": Shards,
        "BF16_Optimizer": NarrowShards,
        "DeepSpeedZeroOptimizer_Stage3": Swapped
        if getattr(engine.optimizer, "swap_optimizer", False)
        else Parts,
    }
    return kinds.get(type(engine.optimizer).__name__, Whole)(engine, named)
