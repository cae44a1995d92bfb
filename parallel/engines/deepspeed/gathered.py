"""Weights that ZeRO-3 has cut, whole while something reads them outside a forward of the objective.

Shapes: O outputs, I inputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from headway.pretrain.models.spectral import SpectralLinear
from headway.pretrain.objectives import Objective

HOLDER = -1
"""A number that no module has with DeepSpeed."""


def gather_in(objective: Objective, package: Any) -> None:
    """Let power iterations find the weights that they read, which ZeRO-3 has cut."""
    spectral = [p for m in objective.modules() if isinstance(m, SpectralLinear) for p in m.parameters()]
    if spectral:
        objective.iterate = _within(objective.iterate, spectral, package)  # type: ignore[method-assign]


def spare_linears(objective: Objective) -> None:
    """Let plain linear layers keep their weight for the backward, and not a view of it, which would keep what ZeRO-3
    has gathered alive between the passes.

    DeepSpeed itself puts its function in the place of torch.nn.functional.linear, for all that the process computes
    from then on. It adds the bias in place, too: to what a policy of recomputation has kept.
    """
    for module in objective.modules():
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            module.forward = partial(_linear, module)  # type: ignore[method-assign]


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3

    y: Tensor = LinearFunctionForZeroStage3.apply(x, layer.weight)
    return y if layer.bias is None else y + layer.bias


def keep_apart(offload: Any) -> None:
    """Let ZeRO-3's hooks gather and free weights unseen by what counts operations: a policy of recomputation, which
    would look for the results of gathering among those of the forward.

    Args:
        offload: DeepSpeed's `DeepSpeedZeRoOffload`.
    """
    for name in ("pre_sub_module_forward_function", "post_sub_module_forward_function"):
        setattr(offload, name, _unseen(getattr(offload, name)))


def _unseen(hook: Callable[[Any], None]) -> Callable[[Any], None]:
    @wraps(hook)
    def unseen(module: Any) -> None:
        with _disable_current_modes():
            hook(module)

    return unseen


def _within(method: Callable[..., Any], parameters: list[nn.Parameter], package: Any) -> Callable[..., Any]:
    """The method with some parameters whole while it runs."""

    @wraps(method)
    def gathered(*args: Any, **kwargs: Any) -> Any:
        with package.zero.GatheredParameters(parameters):
            users = [p.ds_active_sub_modules for p in parameters]  # type: ignore[attr-defined]
            for modules in users:  # who is named here uses them: modules that are called leave them whole
                modules.add(HOLDER)
            try:
                return method(*args, **kwargs)
            finally:
                for modules in users:
                    modules.discard(HOLDER)

    return gathered
