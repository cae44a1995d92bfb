"""What the backward computes again instead of keeping, and what it keeps in host memory."""

from headway.parallel.recompute.apply import recompute
from headway.parallel.recompute.rules import check_recompute

__all__ = ["check_recompute", "recompute"]
