"""Which settings of recomputation go together."""

from __future__ import annotations

from headway.parallel.mesh import Layout
from headway.pretrain.config import Job
from headway.pretrain.errors import JobError
from headway.pretrain.models.inputs import Inputs


def check_recompute(job: Job, layout: Layout, device: str) -> None:
    """Raise JobError for a budget without its size or too small, or for settings of another policy than the job's."""
    p = job.parallel
    if p.recompute == "budget" and p.recompute_budget is None:
        rule = "must be given with parallel.recompute = budget: GiB that a micro-batch's activations may take"
        raise JobError("parallel.recompute_budget", None, rule, 1.0)
    if p.recompute_budget is not None and p.recompute != "budget":
        rule = f"parallel.recompute = {p.recompute} keeps what it keeps: a size needs parallel.recompute = budget"
        raise JobError("parallel.recompute_budget", p.recompute_budget, rule, None)
    if p.recompute_every != 1 and p.recompute != "full":
        rule = f"counts whole blocks: needs parallel.recompute = full, not {p.recompute}"
        raise JobError("parallel.recompute_every", p.recompute_every, rule, 1)
    known = ("dense",), ("window",)
    if p.recompute == "budget" and job.model.attention.mechanisms not in known:
        rule = f"the memory of {', '.join(job.model.attention.mechanisms)} attention is not known by formula"
        raise JobError("parallel.recompute", p.recompute, rule, "full")
    if p.recompute == "budget" and (job.model.bottleneck.hidden or job.model.embedding_trigram):
        what = "bottlenecks (model.bottleneck)" if job.model.bottleneck.hidden else "model.embedding_trigram"
        rule = f"the memory of models with {what} is not known by formula"
        raise JobError("parallel.recompute", p.recompute, rule, "full")
    if p.recompute == "budget" and job.objective.distill.on:
        rule = "the memory of what is learned from a teacher is not known by formula"
        raise JobError("parallel.recompute", p.recompute, rule, "full")
    blocks = job.model.layers + (job.model.decoder_depth if job.model.family == "t5" else 0)
    if p.recompute_every > blocks:
        rule = f"of {blocks} blocks none would be computed again"
        raise JobError("parallel.recompute_every", p.recompute_every, rule, blocks)
    if p.recompute == "budget":
        _check_budget(job, layout, device)


def _check_budget(job: Job, layout: Layout, device: str) -> None:
    """Refuse a budget that no rank could hold whatever is still open: `auto` precision and compilation, and the
    vocabulary of a tokenizer that is not there yet (the head then counts nothing). `apply.recompute` knows them all
    and refuses the rest."""
    from itertools import product

    from headway.parallel.planner.describe import describe
    from headway.parallel.recompute.budget import GIB, least, too_small

    assert job.parallel.recompute_budget is not None
    budget, inputs = job.parallel.recompute_budget * GIB, _inputs(job)
    precisions = ["fp32", "bf16"] if job.precision == "auto" else [job.precision]
    compiled = [False, True] if job.train.compile == "auto" else [bool(job.train.compile)]
    needed = []
    for precision, fused in product(precisions, compiled):
        runs = [
            describe(job, inputs, layout, place, precision=precision, device=device, compiled=fused)
            for place in range(layout.pipeline)
        ]
        needed.append(max(least(run) for run in runs))
    if budget < min(needed):
        raise too_small(budget, max(needed), runs[0].rows)


def _inputs(job: Job) -> Inputs:
    """What data will give, as far as it is known before it is read: a given tokenizer's vocabulary is not."""
    from headway.pretrain.data.dataset import row_lengths
    from headway.pretrain.data.specials import assign
    from headway.pretrain.data.tokenizer import BytesTokenizer

    if job.model.family == "vit":
        images = job.data.images
        return Inputs(length=job.row_tokens, image=images.size, channels=images.channels)
    tokenizer, vocab = job.data.tokenizer, 0
    if tokenizer.kind == "bytes":
        vocab = assign(BytesTokenizer(), job.objective).vocab
    elif tokenizer.kind == "sentencepiece" and tokenizer.path is None:
        vocab = tokenizer.vocab
    return Inputs(vocab, job.data.seq_len, row_lengths(job)[1])
