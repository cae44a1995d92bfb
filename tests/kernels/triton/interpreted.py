"""A program of the tests: the named cases by Triton's interpreter, and how far each is from what it must give, as JSON.

It is started with TRITON_INTERPRET=1: Triton asks once, when it is imported, whether it shall interpret.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headway.kernels.attention.choose import KernelUnavailable
from headway.kernels.attention.masks import Mask
from headway.kernels.maps.operands import Scores, Seen
from headway.tests.kernels.triton.cases import (
    CASES,
    HIDDEN,
    LOSSES,
    Case,
    Found,
    compute,
    drawn,
    expected,
    largest_score,
    losses_of,
)
from headway.tests.kernels.triton.finding import find_triton


def apart(found: Found, wanted: Found) -> list[float]:
    """Largest deviations of sums and gradients, relative to the largest values."""
    pairs = zip((found.sums, *found.gradients), (wanted.sums, *wanted.gradients), strict=True)
    return [float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs]


def largest(found: Found, sample: int | None = None) -> float:
    """The largest number of all, or of one sample's sums, queries and keys."""
    tensors = (found.sums, *found.gradients[:2])
    return max(float((x if sample is None else x[sample]).abs().max()) for x in tensors)


def twins() -> Case:
    """A student that is its teacher."""
    student = drawn(lengths=(20, 20)).student
    return Case(student, student, Seen(Mask()))


def refusals(sums: Callable[..., Tensor]) -> dict[str, str]:
    """What is said of operands that the kernels do not take."""
    found = {}
    for name, dtype, dim in (
        ("fp64", torch.float64, 16),
        ("bf16", torch.bfloat16, 16),
        ("wide", torch.float32, 520),
    ):
        scores = Scores(*torch.zeros(2, 1, 1, 4, dim, dtype=dtype), 1.0)
        try:
            sums(scores, scores, "kl", Seen(Mask(False)), None)
        except KernelUnavailable as error:
            found[name] = str(error)
    return found


def main() -> None:
    if not find_triton():
        print("null")
        return
    from headway.kernels.triton.map_distillation import sums

    results: dict[str, Any] = {"apart": {}, "score": {}, "hidden": {}}
    for name in sys.argv[1:]:
        case = CASES[name]()
        results["score"][name] = largest_score(case)
        for loss in losses_of(name):
            found = compute(sums, case, loss)
            results["apart"][f"{name}: {loss}"] = apart(found, expected(case, loss))
            if name == HIDDEN:
                results["hidden"][loss] = largest(found, 1)
    results["twins"] = {loss: largest(compute(sums, twins(), loss)) for loss in LOSSES}
    results["refusals"] = refusals(sums)
    print(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
