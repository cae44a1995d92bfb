"""Which samples a step used, as a few numbers that add up over the ranks that read different rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LOW = (1 << 32) - 1
NAMES = ("used.rows", "used.draws_high", "used.draws_low", "used.digest_high", "used.digest_low")


@dataclass(frozen=True)
class Used:
    """The samples of a global batch, whatever their order.

    Attributes:
        rows: how many they are.
        draws: sum of their places in the global order.
        digest: sum of their keys (hashes of source, seed, number and epoch) modulo 2^64. Two sets of samples that
            differ have equal digests with probability 2^-64.
    """

    rows: int
    draws: int
    digest: int


def shares(batch: Mapping[str, Tensor]) -> dict[str, int]:
    """This rank's part of `Used`, by the names of `NAMES`; nothing if the batch has no keys.

    64-bit sums go in halves of 32 bits, so that ranks may add them in fp64 and lose nothing: exact below 2^21 rows
    of a global batch and as many ranks. It costs a few sums over [n] and one copy from the device.
    """
    if "key" not in batch:
        return {}
    draws, digest = batch["sample"], batch["key"].sum()  # wraps, as sums of int64 do
    halves = [(draws >> 32).sum(), (draws & LOW).sum(), (digest >> 32) & LOW, digest & LOW]
    return dict(zip(NAMES, [len(draws), *torch.stack(halves).tolist()], strict=True))


def from_sums(sums: Mapping[str, float]) -> Used | None:
    """`Used` of the global batch from the summed shares; None if there are none."""
    if NAMES[0] not in sums:
        return None
    rows, draws_high, draws_low, digest_high, digest_low = (int(sums[name]) for name in NAMES)
    return Used(rows, (draws_high << 32) + draws_low, ((digest_high << 32) + digest_low) % (1 << 64))
