"""From a job and its layout to what memory depends on."""

from __future__ import annotations

from typing import cast

from headway.kernels.attention.choose import choose
from headway.parallel.mesh import Layout
from headway.parallel.pipeline.rules import micro_rows
from headway.parallel.planner.activations import Kernel
from headway.parallel.planner.places import Run
from headway.pretrain.config import Job
from headway.pretrain.device import PRECISIONS
from headway.pretrain.models.inputs import Inputs


def describe(
    job: Job, inputs: Inputs, layout: Layout, place: int, *, precision: str, device: str, compiled: bool
) -> Run:
    """What memory depends on, on a rank.

    Args:
        job: the settings.
        inputs: sizes that the data gives, of whole rows.
        layout: ranks along each axis.
        place: the rank's among the stages of a pipeline.
        precision: resolved, not `auto`.
        device: `cpu` or `cuda`.
        compiled: whether blocks are compiled.
    """
    attention = job.model.attention
    kernel = choose(
        attention.of_layer(0),
        attention.kernel,
        dropout=attention.dropout > 0,
        bias=job.model.biased,
        device=device,
        dtype=PRECISIONS[precision],
        compiled=compiled,
        keys=job.row_tokens,
        described=job.model.positions == "alibi",
        causal=job.model.family == "gpt",
        width=job.model.head_width,
    )
    # All of these keep what goes in, the output and a sum a row.
    name = "sdpa" if kernel.name in ("flex", "triton") else kernel.name
    rows = micro_rows(job, layout)
    return Run(
        job.model_copy(update={"precision": precision}),
        inputs,
        rows,
        cast(Kernel, name),
        layout,
        device,
        place,
        micros=job.train.global_batch // layout.data // rows,
    )
