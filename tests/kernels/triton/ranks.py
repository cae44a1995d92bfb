"""Ranks in one process: what each computes between collectives is computed again until all are answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

_OPS: dict[str, Any] = {"sum": torch.sum, "max": torch.amax, "min": torch.amin}


class _Unanswered(Exception):
    """A collective whose other ranks have not been heard."""


def _total(heard: Iterator[Tensor], asked: list[tuple[Tensor, str]], x: Tensor, op: str) -> Tensor:
    answer = next(heard, None)
    if answer is None:
        asked.append((x.clone(), op))
        raise _Unanswered
    return answer.clone()


def over_ranks(ranks: int, of: Callable[[int, Callable[[Tensor, str], Tensor]], Any]) -> list[Any]:
    """What every rank returns.

    Args:
        of: (rank, total) -> what that rank computes, the same at every call; `total` is (x, op) -> over all ranks.
    """
    answers: list[Tensor] = []
    while True:
        asked: list[tuple[Tensor, str]] = []
        returned = []
        for rank in range(ranks):
            heard = iter(answers)

            try:
                returned.append(of(rank, partial(_total, heard, asked)))
            except _Unanswered:
                continue
        if not asked:
            return returned
        assert len({op for _, op in asked}) == 1
        assert len(asked) == ranks
        answers.append(_OPS[asked[0][1]](torch.stack([x for x, _ in asked]), dim=0))
