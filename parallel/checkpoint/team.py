"""The ranks that save or load together: what they tell each other, as tensors of integers, never pickled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from headway.pretrain.errors import CheckpointError


class Team:
    """A process group, or this process alone where torch.distributed has not been started.

    Args:
        group: the ranks that hold one state; the default group if not given.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        started = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if started else 0
        self.world = dist.get_world_size(group) if started else 1
        self.device = "cuda" if started and dist.get_backend(group) == "nccl" else "cpu"

    def gather(self, values: Sequence[int]) -> Tensor:
        """[world, n] int64: the `n` values that each rank gives; collective, `n` equal on all ranks."""
        mine = torch.tensor(values, dtype=torch.int64, device=self.device)
        if self.world == 1 or not values:
            return mine.cpu().expand(self.world, -1)
        rows = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(rows, mine, group=self.group)
        return torch.stack(rows).cpu()

    def gather_uneven(self, values: Sequence[int]) -> list[list[int]]:
        """What each rank gives, of any length; collective."""
        lengths = self.gather([len(values)])[:, 0].tolist()
        padded = [*values, *[0] * (max(lengths) - len(values))]
        return [row[:n] for row, n in zip(self.gather(padded).tolist(), lengths, strict=True)]

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that succeeds on all ranks or raises on all of them: none waits for a rank that left.

        Collective at its end. A rank where the block raised raises that error, the others a CheckpointError
        with the text of the first rank that failed.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        if self.world > 1:
            text = f"{type(failure).__name__}: {failure}" if failure else ""
            texts = self.gather_uneven(list(text.encode()))
            failed = [rank for rank, text in enumerate(texts) if text]
            if failed and failure is None:
                text = bytes(texts[failed[0]]).decode()
                raise CheckpointError(f"rank {failed[0]} failed: {text.removeprefix('CheckpointError: ')}")
        if failure:
            raise failure


def spread(holders: Sequence[Sequence[int]], sizes: Sequence[int], world: int) -> list[int]:
    """Give each item to one of the ranks that hold it, so that bytes are even; the same answer on all ranks.

    Largest first, to the holder with the least so far, the lowest rank on a tie (Graham 1969, LPT rule).
    """
    owners, load = [ranks[0] for ranks in holders], [0] * world
    for item, ranks in enumerate(holders):
        if len(ranks) == 1:
            load[ranks[0]] += sizes[item]
    shared = [item for item, ranks in enumerate(holders) if len(ranks) > 1]
    for item in sorted(shared, key=lambda item: -sizes[item]):
        owners[item] = min(holders[item], key=lambda rank: (load[rank], rank))
        load[owners[item]] += sizes[item]
    return owners
