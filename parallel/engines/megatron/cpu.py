"""Megatron-Core 0.16.1 on a machine without CUDA, so that its layers, buffers, optimizers and schedules can be tested.

Megatron says `torch.cuda` and `device="cuda"` where it means "here". `adapt` makes its modules mean the CPU. It does
nothing where CUDA is, and no name of torch is changed anywhere: what is replaced belongs to Megatron's modules.

Replaced, in every loaded module of `megatron.core`:

- its global `torch`, by an object that passes everything on to torch but `cuda`, whose names answer for the CPU:
  `current_device` (hundreds of buffers are made there), streams and events that do nothing, the generator of the CPU
  in the place of the GPU's;
- the texts "cuda" and "torch.cuda.FloatTensor" and its kin in the code of its functions, by "cpu" and
  "torch.FloatTensor": devices in the calls that make tensors, and the optimizers' questions to `Tensor.type()`.
  The one in `schedules.forward_step` stays, `torch.autocast("cuda")`, which does nothing here: see `guards`;
- where autocast is remembered for the backward of its linears, "cuda", by "cpu": otherwise under autocast
  their backward multiplies bf16 with fp32;
- `tensor_parallel.random._lazy_call`, which would keep the setting of a generator back until CUDA starts;
- `moe.token_dispatcher.maybe_move_tensor_to_cpu`, which gives arrays of numpy for tensors of a GPU only.

`moe_utils.te_general_gemm` is not replaced but missing: without Transformer Engine Megatron's router raises NameError,
on a GPU too. `adapt` gives it the value None that the router then looks for.

What this cannot show: NCCL, and what happens when kernels and collectives of several streams overlap (here they
follow each other, or gloo's threads do them); Transformer Engine's and Apex's kernels; CUDA graphs; fp8; pinned memory.
`Tensor.cuda()` and `is_cuda` stay what they are, so that neither Megatron's offloading nor
`DynamicGradScaler.load_state_dict` works here.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")

MODULES = (
    "parallel_state",
    "tensor_parallel.layers",
    "tensor_parallel.cross_entropy",
    "distributed",
    "distributed.finalize_model_grads",
    "optimizer",
    "optimizer.distrib_optimizer",
    "pipeline_parallel.schedules",
    "transformer.moe.token_dispatcher",
    "transformer.moe.router",
)
"""Loaded before anything is replaced: what is loaded later is Megatron's own."""

KEPT = ("forward_step",)
"""Functions whose texts stay."""


def adapt() -> None:
    """Let Megatron-Core run on the CPU where there is no CUDA; can be called again, after more of it was loaded."""
    for name in MODULES:
        importlib.import_module(f"megatron.core.{name}")
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    if torch.cuda.is_available():
        return
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = HERE  # type: ignore[attr-defined]
            for function in functions_of(module):
                function.__code__ = translated(function.__code__)
    _remember_autocast()
    _replace_functions()


# -- what answers for torch.cuda -------------------------------------------------------------------------------


class Stream:
    """Work is done when it was asked for: nothing to wait for. An event, too."""

    def __init__(self, *args: Any, **settings: Any) -> None: ...

    def wait_stream(self, stream: Stream) -> None: ...

    def record_event(self, event: Stream | None = None) -> Stream:
        return event or self

    def synchronize(self) -> None: ...

    wait_event = record = wait = wait_stream


class Cuda:
    """`torch.cuda` as Megatron uses it, of the CPU; other names are torch's own."""

    Stream = Event = Stream
    _only = Stream()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @property
    def random(self) -> Cuda:
        return self

    @property
    def default_generators(self) -> dict[torch.device, torch.Generator]:
        return {CPU: torch.default_generator}

    def current_device(self) -> torch.device:
        return CPU

    def current_stream(self, device: Any = None) -> Stream:
        return self._only

    default_stream = current_stream

    def stream(self, stream: Stream) -> AbstractContextManager[None]:
        return nullcontext()

    def synchronize(self, device: Any = None) -> None: ...

    def empty_cache(self) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()


class Here:
    """torch, but with `Cuda` for `cuda`. The one generator that there is plays the GPU's; that of the CPU has no state
    then, which Megatron keeps beside it and compares."""

    cuda = Cuda()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def get_rng_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor) -> None: ...


HERE = Here()


# -- what is said in code --------------------------------------------------------------------------------------


def translated(code: types.CodeType) -> types.CodeType:
    """The same code with the names of CUDA's device and tensor types changed to the CPU's."""
    if code.co_name in KEPT:
        return code
    return code.replace(co_consts=tuple(map(_translate, code.co_consts)))


def _translate(constant: Any) -> Any:
    if isinstance(constant, types.CodeType):
        return translated(constant)
    if isinstance(constant, tuple):
        return tuple(map(_translate, constant))
    if not isinstance(constant, str):
        return constant
    return "cpu" if constant == "cuda" else constant.replace("torch.cuda.", "torch.") if _is_type(constant) else constant


def _is_type(text: str) -> bool:
    return text.startswith("torch.cuda.") and text.endswith("Tensor")


def functions_of(module: types.ModuleType) -> Iterator[types.FunctionType]:
    """Functions and methods that were written in a module, under their decorators."""
    for value in list(vars(module).values()):
        of_class = inspect.isclass(value) and value.__module__ == module.__name__
        for member in vars(value).values() if of_class else [value]:
            plain = getattr(member, "__func__", getattr(member, "fget", member))
            function = inspect.unwrap(plain) if callable(plain) else plain
            if isinstance(function, types.FunctionType) and function.__code__.co_filename == module.__file__:
                yield function


# -- functions -------------------------------------------------------------------------------------------------


def _remember_autocast() -> None:
    """Decorate forward and backward of the linears anew."""
    from megatron.core.tensor_parallel import layers

    for function in (layers.LinearWithFrozenWeight, layers.LinearWithGradAccumulationAndAsyncCommunication):
        for name, decorate in (("forward", torch.amp.custom_fwd), ("backward", torch.amp.custom_bwd)):
            plain: Callable[..., Any] = inspect.unwrap(getattr(function, name))
            setattr(function, name, staticmethod(functools.partial(decorate, device_type="cpu")(plain)))


def _replace_functions() -> None:
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher

    def call(function: Callable[[], None], **settings: Any) -> None:
        function()

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor

    random._lazy_call = call
    token_dispatcher.maybe_move_tensor_to_cpu = move
