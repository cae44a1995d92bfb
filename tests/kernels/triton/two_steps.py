"""A program of the tests: two optimizer steps of a recipe in this process, what they gave, and which kernels ran.

Arguments: the recipe, a file for the parameters afterwards, settings. Prints losses, norms of gradients and the names
of Triton's kernels that were launched, as JSON. Started with TRITON_INTERPRET=1 it computes by Triton's kernels on a
CPU, where `train.kernels` is `triton`.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path

import torch
from safetensors.torch import save_file

from headway.tests.kernels.triton.finding import find_triton

STEPS = 2


def main(recipe: str, file: str, *sets: str) -> None:
    find_triton()
    from headway.launch.assemble import assemble, join
    from headway.pretrain.recipe import resolve
    from headway.tests.kernels.triton.launches import recorded

    resolved = resolve([recipe], [*sets, f"train.steps={STEPS}"])
    parts = assemble(resolved, join(resolved.job))
    with closing(parts.loader), recorded(run=True) as launches:
        results = [parts.engine.train_step(next(parts.loader), step) for step in range(STEPS)]
    save_file({name: p.detach().clone() for name, p in parts.engine.named.items()}, Path(file))
    print(
        json.dumps(
            {
                "losses": [r.loss for r in results],
                "norms": [r.grad_norm for r in results],
                "kernels": sorted({launch.name for launch in launches}),
            }
        )
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
