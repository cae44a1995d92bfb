"""A moving average of the weights, for evaluation and export (Polyak and Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from headway.pretrain.optim.sharded import local


class Average:
    """average <- decay x average + (1 - decay) x weight, from the weights that it is made with.

    Holds one more tensor for each parameter, spread as the parameter is; sends nothing.

    Args:
        named_parameters: canonical name -> parameter; frozen ones are held too, so that the state is a whole
            model's.
        decay: of the average, from 0 to 1.
        changed: called whenever `swapped` has changed the parameters' values; an engine drops here what it
            keeps of them elsewhere (FSDP2: parameters that are still gathered).
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        decay: float,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.parameters = dict(named_parameters)
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.decay, self.changed = decay, changed

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters as they are now into the average: after every optimizer step."""
        torch._foreach_lerp_(self._averages(), self._weights(), 1 - self.decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within, the parameters hold the averages (and the averages' tensors the weights, bit for bit)."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state(self) -> dict[str, Tensor]:
        """The averages under the parameters' names; the tensors are the live ones."""
        return dict(self.averages)

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, average in zip(self._weights(), self._averages(), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        self.changed()

    def _weights(self) -> list[Tensor]:
        return [local(p) for p in self.parameters.values()]

    def _averages(self) -> list[Tensor]:
        return [local(a) for a in self.averages.values()]
