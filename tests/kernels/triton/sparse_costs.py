"""What loops of sparse attention's kernels share. Shapes: D head dimension, W its power of two."""

from __future__ import annotations

from headway.tests.kernels.triton.launches import Launch


def columns(launch: Launch) -> tuple[bool, float]:
    """Whether a launch loads operands that it would keep for every tile again, C columns at once; and columns that it
    multiplies then, as a share of W."""
    given = launch.arguments
    parts = given["C"] < given["W"]
    return parts, -(-given["D"] // given["C"]) * given["C"] / given["W"] if parts else 1.0
