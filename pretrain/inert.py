"""Settings that have no effect in a given job, as a table: field (or section, with a dot at the end), when it counts,
why it does not."""

from __future__ import annotations

from collections.abc import Callable

from headway.kernels.attention.registry import mechanism, words
from headway.pretrain.config import Attention, Job
from headway.pretrain.config.distill import TERMS, Distill
from headway.pretrain.config.trackers import OWN
from headway.pretrain.errors import JobError
from headway.pretrain.recipe import DEFAULT, Resolved

Rule = tuple[str, Callable[[Job], bool], str]

RULES: list[Rule] = [
    ("data.images.", lambda j: j.model.family == "vit", "only the family vit reads images"),
    ("data.seq_len", lambda j: j.model.family != "vit", "an image has as many tokens as patches"),
    ("data.tokenizer.", lambda j: j.model.family != "vit", "images need no tokenizer"),
    (
        "data.target_len",
        lambda j: j.model.family == "t5" and j.objective.name in ("pairs", "prefix"),
        "the objective derives it, or there is no decoder beside an encoder",
    ),
    (
        "data.documents",
        lambda j: j.objective.name in ("causal", "prefix", "masked") and j.model.family != "t5",
        "rows of this objective are not packed documents",
    ),
    ("model.decoder_layers", lambda j: j.model.family == "t5", "only the family t5 has a decoder of its own"),
    ("model.segments", lambda j: j.model.family == "bert", "only the family bert has segments"),
    ("model.pooler", lambda j: j.model.family == "bert", "only the family bert has a pooler"),
    ("model.embedding_size", lambda j: j.model.family != "vit", "patches have no table"),
    ("model.vision.", lambda j: j.model.family == "vit", "only the family vit has patches"),
    ("model.relative_buckets", lambda j: j.model.positions == "relative", "model.positions is not relative"),
    ("model.relative_distance", lambda j: j.model.positions == "relative", "model.positions is not relative"),
    (
        "model.experts.",
        lambda j: j.model.experts.count > 0,
        "model.experts.count is 0: the model is dense",
    ),
    (
        "model.init.std",
        lambda j: j.model.init.scheme in ("gpt2", "normal", "bert", "vit"),
        "this scheme has deviations of its own",
    ),
    ("model.bottleneck.", lambda j: bool(j.model.bottleneck.hidden), "model.bottleneck.hidden is not given"),
    ("objective.infill.", lambda j: j.objective.name == "causal", "objective.name is not causal"),
    ("objective.masking.", lambda j: j.objective.name == "masked", "objective.name is not masked"),
    (
        "objective.masking.span_mean",
        lambda j: j.objective.masking.unit == "span",
        "objective.masking.unit is not span",
    ),
    (
        "objective.masking.span_max",
        lambda j: j.objective.masking.unit == "span",
        "objective.masking.unit is not span",
    ),
    (
        "objective.spans.",
        lambda j: j.objective.name in ("spans", "ul2"),
        "objective.name is neither spans nor ul2",
    ),
    ("objective.denoisers", lambda j: j.objective.name == "ul2", "objective.name is not ul2"),
    ("objective.augment.", lambda j: j.model.family == "vit", "only images are augmented"),
    ("objective.pool", lambda j: j.objective.name == "classify", "objective.name is not classify"),
    ("objective.mae.", lambda j: j.objective.name == "mae", "objective.name is not mae"),
    ("objective.label_smoothing", lambda j: j.objective.name != "mae", "pixels have no labels"),
    ("objective.z_loss", lambda j: j.model.family != "vit", "there is no softmax over words"),
    (
        "train.eval_overlap",
        lambda j: j.objective.name == "causal",
        "held-out rows overlap for causal models only",
    ),
    ("train.ramp.increment", lambda j: j.train.ramp.start is not None, "train.ramp.start is not given"),
    ("train.ramp.samples", lambda j: j.train.ramp.start is not None, "train.ramp.start is not given"),
    ("model.rotary_base", lambda j: j.model.positions == "rotary", "model.positions is not rotary"),
    *(
        (f"model.rotary_scaling.{name}", lambda j, kinds=kinds: j.model.rotary_scaling.kind in kinds, why)
        for name, kinds, why in (
            ("factor", ("linear", "ntk", "yarn", "llama3"), "model.rotary_scaling.kind is none"),
            ("original_length", ("yarn", "llama3"), "this way of stretching does not depend on it"),
            ("slow", ("yarn", "llama3"), "this way of stretching does not depend on it"),
            ("fast", ("yarn", "llama3"), "this way of stretching does not depend on it"),
            ("whole", ("yarn",), "model.rotary_scaling.kind is not yarn"),
            ("attention_factor", ("yarn",), "model.rotary_scaling.kind is not yarn"),
        )
    ),
    ("model.rotary_scaling.", lambda j: j.model.positions == "rotary", "model.positions is not rotary"),
    (
        "model.attention.qk_norm",
        # Taking back what a recipe asks for is how such a model is made from it.
        lambda j: not j.model.attention.qk_norm or j.model.family == "t5" or not _mixers_alone(j),
        "no layer of the model has heads of queries and keys that it could normalise",
    ),
    ("model.max_positions", lambda j: j.model.positions == "learned", "only learned positions have a table"),
    ("data.tokenizer.vocab", lambda j: _trained(j), "the vocabulary is that of the given tokenizer"),
    ("data.tokenizer.train_bytes", lambda j: _trained(j), "no tokenizer is trained"),
    ("data.tokenizer.path", lambda j: j.data.tokenizer.kind != "bytes", "bytes need no tokenizer file"),
    ("optimizer.muon_lr", lambda j: j.optimizer.name == "muon", "optimizer.name is not muon"),
    ("optimizer.momentum", lambda j: j.optimizer.name == "muon", "optimizer.name is not muon"),
    ("schedule.decay", lambda j: j.schedule.name == "wsd", "only wsd has a decay phase of its own"),
    (
        "schedule.floor",
        lambda j: j.schedule.name in ("cosine", "linear", "wsd"),
        "this schedule has no floor",
    ),
    (
        "schedule.steps",
        lambda j: j.schedule.name in ("cosine", "linear", "wsd"),
        "this schedule does not depend on its length",
    ),
    ("train.eval_rows", lambda j: j.train.eval_every > 0, "train.eval_every is 0"),
    ("parallel.schedule", lambda j: j.parallel.pipeline != 1, "parallel.pipeline is 1"),
    ("parallel.virtual", lambda j: j.parallel.pipeline != 1, "parallel.pipeline is 1"),
    (
        "parallel.reshard",
        lambda j: j.parallel.shard != 1 or j.parallel.context != 1,
        "parallel.shard and parallel.context are 1: nothing is gathered",
    ),
    (
        "parallel.reshard",
        lambda j: j.parallel.pipeline == 1,
        "in a pipeline gathered parameters stay for the step",
    ),
    ("parallel.sequence", lambda j: j.parallel.tensor != 1, "parallel.tensor is 1"),
    ("parallel.context_method", lambda j: j.parallel.context != 1, "parallel.context is 1"),
    ("parallel.expert", lambda j: j.model.experts.count > 0, "model.experts.count is 0: the model is dense"),
    ("parallel.check_every", lambda j: _spread(j), "one process has no replicas to compare"),
    *(
        (field, lambda j: j.objective.distill.teacher is not None and j.objective.distill.cache is None, why)
        for field in ("parallel.teacher.", "objective.distill.precision")
        for why in ("no teacher computes here: objective.distill has none, or a cache in its stead",)
    ),
    *(
        (f"objective.distill.{name}", lambda j: j.objective.distill.on, "nothing is learned from a teacher")
        for name in ("teacher", "cache", "precision", "init", "layers", "task", *(f"{t}." for t in TERMS))
    ),
    (
        "objective.distill.layers",
        lambda j: _by_common_map(j.objective.distill),
        "no part of the loss is learned by these layers",
    ),
    (
        "objective.distill.attention.across",
        lambda j: j.model.family == "t5",
        "only the family t5 has cross-attention",
    ),
    (
        "objective.distill.logits.top_k",
        lambda j: j.objective.name != "classify",
        "a classifier is compared in all its classes",
    ),
    (
        "objective.distill.logits.temperature",
        lambda j: not j.objective.distill.logits.hard,
        "objective.distill.logits.hard: a label has no temperature",
    ),
    (
        "objective.distill.logits.divergence",
        lambda j: not j.objective.distill.logits.hard,
        "objective.distill.logits.hard: labels have the cross-entropy",
    ),
    (
        "tracking.prometheus.",
        lambda j: "prometheus" in j.tracking.backends,
        "tracking.backends has no prometheus",
    ),
    *(
        (
            f"tracking.{name}",
            lambda j: j.tracking.wandb != "off" or "tensorboard" in j.tracking.backends,
            "tracking.wandb is off, and tracking.backends has no tensorboard",
        )
        for name in ("histograms_every", "samples_every")
    ),
    (
        "tracking.project",
        lambda j: j.tracking.wandb != "off" or bool({*j.tracking.backends} - {*OWN}),
        "tracking.wandb is off, and tracking.backends has no tracker",
    ),
    *(
        (f"tracking.{name}", lambda j: j.tracking.wandb != "off", "tracking.wandb is off")
        for name in (
            "entity",
            "group",
            "job_type",
            "tags",
            "notes",
            "x_axis",
            "alerts",
            "exporters",
        )
    ),
    (
        "tracking.energy.watts",
        lambda j: j.tracking.energy.source in ("auto", "tdp"),
        "tracking.energy.source estimates nothing",
    ),
    *(
        (
            f"tracking.energy.{name}",
            lambda j: j.tracking.energy.source != "off",
            "tracking.energy.source is off",
        )
        for name in ("pue", "grid")
    ),
]


def _read(job: Job) -> set[str]:
    """Numbers that some mechanism of the model reads."""
    return {name for word in job.model.attention.mechanisms for name in mechanism(word).settings}


RULES += [
    (f"model.attention.{name}", lambda j, name=name: name in _read(j), "no mechanism of the model reads it")
    for name in sorted(
        {name for row in words().values() for name in row.settings} & {*Attention.model_fields}
    )
] + [
    (
        "model.attention.span_penalty",
        lambda j: "span" in j.model.attention.mechanisms,
        "no mechanism of the model learns a span",
    ),
    (
        "model.attention.mechanism",
        lambda j: not j.model.attention.pattern,
        "model.attention.pattern names the layers' mechanisms",
    ),
]


def _learned(name: str, field: str) -> Callable[[Job], bool]:
    """Whether the part has a weight that a setting of distillation is of; rows read `attention.heads` too."""
    names = {name, "rows"} if (name, field) == ("attention", "heads") else {name}
    return lambda j: bool(names & j.objective.distill.terms.keys())


RULES += [
    (f"objective.distill.{name}.{field}", _learned(name, field), f"objective.distill.{name}.weight is 0")
    for name in TERMS
    for field in type(getattr(Distill(), name)).model_fields
    if field != "weight"
]


def _by_common_map(settings: Distill) -> bool:
    """Whether some part of the loss is learned by the layers that are given for all."""
    return any(getattr(term, "layers", "own") is None for term in settings.terms.values())


def _mixers_alone(job: Job) -> bool:
    """Whether every layer is a module of its own."""
    return all(mechanism(word).kind == "mixer" for word in job.model.attention.mechanisms)


def _spread(job: Job) -> bool:
    """Whether there may be several ranks."""
    p = job.parallel
    return any(size != 1 for size in (p.pipeline, p.replicate, p.shard, p.context, p.tensor))


def _trained(job: Job) -> bool:
    return job.data.tokenizer.kind == "sentencepiece" and job.data.tokenizer.path is None


def inert(resolved: Resolved) -> dict[str, str]:
    """Field -> reason, for every setting that was given and has no effect."""
    given = {f for f, origin in resolved.origins.items() if origin != DEFAULT}
    idle = [(field, why) for field, counts, why in RULES if not counts(resolved.job)]
    return {
        one: why
        for field, why in reversed(idle)
        for one in sorted(given)
        if one == field or (field.endswith(".") and one.startswith(field))
    }


def refuse_inert(resolved: Resolved) -> None:
    """Raise JobError if the command line sets something that has no effect."""
    for field, why in inert(resolved).items():
        if resolved.set_by_hand(field):
            raise JobError(
                field, "given on the command line", f"has no effect in this job: {why}", "leave it out"
            )
