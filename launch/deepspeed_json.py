"""`headway config show --engine deepspeed`: the DeepSpeed JSON that a recipe stands for."""

from __future__ import annotations

import json
from collections.abc import Sequence

from headway.parallel import mesh
from headway.parallel.engines import capabilities
from headway.parallel.engines.deepspeed.merge import configure
from headway.pretrain import device as devices
from headway.pretrain.recipe import resolve


def show(recipes: Sequence[str], sets: Sequence[str], ranks: int) -> None:
    """Print it, with what `parallel.deepspeed.config` adds.

    Args:
        ranks: over which the recipe is laid out.

    Raises:
        JobError: the DeepSpeed engine cannot do what the recipe asks for, or the file contradicts it.
    """
    job = resolve(recipes, [*sets, "parallel.engine=deepspeed"]).job
    layout = mesh.lay_out(job.parallel, mesh.students(job, ranks))
    device = devices.choose_device(job.parallel.device)
    capabilities.check(job, layout, device.type)
    rows = mesh.rows_per_micro_batch(job, layout.data) * job.row_tokens
    precision, _ = devices.choose_precision(
        job.precision, device, hidden=job.model.hidden, rows=rows, ffn=job.model.ffn_width
    )
    print(json.dumps(configure(job, layout, precision, device.type), indent=2))
