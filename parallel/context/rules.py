"""Which jobs context parallelism can take; each refusal names the nearest legal choice."""

from __future__ import annotations

from headway.kernels.attention.registry import mechanism
from headway.parallel.mesh import Layout
from headway.pretrain.config import Job
from headway.pretrain.errors import JobError


def check(job: Job, layout: Layout) -> None:
    """Raise JobError if the job cannot be spread along the context axis as it asks."""
    if layout.context == 1:
        return
    _check_lengths(job, layout)
    _check_kernel(job, layout)
    if job.model.embedding_trigram:
        rule = "with model.embedding_trigram a token is embedded with its neighbours, which other ranks would have"
        raise JobError("parallel.context", layout.context, rule, 1)
    if job.parallel.context_method == "ulysses":
        _check_heads(job, layout)
    if job.model.init.lsuv and job.objective.name == "classify" and job.objective.pool == "first":
        rule = (
            "with parallel.context > 1 the last block computes all patches too, not the tokens before them alone, and "
            "their variance would be another"
        )
        raise JobError("model.init.lsuv", True, rule, False)


def _check_lengths(job: Job, layout: Layout) -> None:
    """Every rank has a column of every sequence."""
    lengths = {"data.seq_len": job.row_tokens}
    if job.model.family == "vit":
        lengths = {"data.images.size": job.row_tokens}
        if job.objective.name == "mae":
            first = job.model.vision.prefix_tokens
            patches = job.row_tokens - first
            lengths["objective.mae.rate"] = first + max(1, int(patches * (1 - job.objective.mae.rate)))
    if job.model.family == "t5":
        from headway.pretrain.data.dataset import row_lengths

        lengths["data.target_len"] = row_lengths(job)[1]
    for field, columns in lengths.items():
        if columns < layout.context:
            rule = f"{field} gives a sequence of {columns} columns, and every rank must have one"
            raise JobError("parallel.context", layout.context, rule, columns)


def _check_kernel(job: Job, layout: Layout) -> None:
    kernel, method = job.model.attention.kernel, job.parallel.context_method
    for word in job.model.attention.mechanisms:
        can = mechanism(word).supports
        if "context_ulysses" not in can:
            rule = f"model.attention has {word!r}, which needs whole rows of all heads"
            raise JobError("parallel.context", layout.context, rule, 1)
        if method == "ring" and "context_ring" not in can:
            rule = f"model.attention has {word!r}, and rings know dense and window attention"
            raise JobError("parallel.context_method", method, rule, "ulysses")
    if method == "ring" and kernel not in ("auto", "blocks"):
        rule = "ring attention computes by row blocks; parallel.context_method = ulysses takes any kernel"
        raise JobError("model.attention.kernel", kernel, rule, "blocks")


def _check_heads(job: Job, layout: Layout) -> None:
    """Heads are dealt out evenly."""
    share = layout.context * layout.tensor
    heads = {"model.heads": job.model.heads}
    if job.objective.name == "mae":
        heads["objective.mae.heads"] = job.objective.mae.heads
    for field, count in heads.items():
        if count % share:
            of = f"parallel.context x parallel.tensor = {layout.context} x {layout.tensor}"
            rule = f"deals out heads: {of} must divide {field} = {count}"
            legal = [c for c in range(2, layout.context) if count % (c * layout.tensor) == 0]
            other = f", or parallel.context = {legal[-1]}" if legal else ""
            raise JobError("parallel.context_method", "ulysses", rule, f"ring{other}")
