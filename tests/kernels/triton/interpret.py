"""A program of the tests: cases by Triton's interpreter, how far apart they are and what it counted, as JSON.

It is started with TRITON_INTERPRET=1: Triton asks once, when it is imported, whether it shall interpret. Arguments: an
op and the name of a case, and so on. Fresh memory is poisoned, so that what is not written is seen.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

import torch

from headway.tests.kernels.triton.counting import counted
from headway.tests.kernels.triton.finding import find_triton


def main(*asked: str) -> None:
    if not find_triton():
        print("null")
        return
    from headway.tests.kernels.triton import proof

    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    os.environ["HEADWAY_TEST_SEED"] = str(proof.seed())
    found = [computed(op, name) for op, name in zip(asked[::2], asked[1::2], strict=True)]
    print(json.dumps({"seed": proof.seed(), "cases": found}))


def computed(op: str, name: str) -> dict[str, Any]:
    """Of a case: deviations and tolerances, bytes and FLOPs as counted and as the op's formulas have them."""
    from headway.tests.kernels.triton.launches import recorded

    module = importlib.import_module(f"headway.tests.kernels.triton.proofs.{op}")
    with counted() as count, recorded(run=True) as launches:
        results = module.CASES[name](torch.device("cpu"))
    apart = {what: deviation(*each) for what, each in results.items()}
    costs = [module.COSTS[launch.name](launch) for launch in launches]
    expected = [sum(each) for each in zip(*((*cost[:2], cost.products) for cost in costs), strict=True)]
    return {
        "op": op,
        "name": name,
        "apart": apart,
        "counted": [count.read, count.written, count.products],
        "expected": expected,
    }


def deviation(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> tuple[float, float]:
    """The largest, absolute, and the tolerance; infinite where something is not finite that must be."""
    apart = (found.detach().cpu().double() - wanted.detach()).abs()
    return (float(apart.max()) if apart.isfinite().all() else float("inf")), tolerance


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
