"""Rules that bind several settings of a job; each violation is a JobError that names the nearest legal choice."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headway.pretrain.config.distilling import check_distill
from headway.pretrain.config.mechanisms import check_attention
from headway.pretrain.energy.grid import find_grid
from headway.pretrain.errors import JobError

if TYPE_CHECKING:
    from headway.pretrain.config import Job

FAMILIES_OF = {
    "causal": ("gpt",),
    "prefix": ("gpt", "t5"),
    "masked": ("bert",),
    "spans": ("t5",),
    "ul2": ("t5",),
    "pairs": ("t5",),
    "classify": ("vit",),
    "mae": ("vit",),
}
"""Which families an objective trains."""

POSITIONS_OF = {
    "gpt": ("learned", "sinusoidal", "rotary", "alibi", "none"),
    "bert": ("learned", "sinusoidal", "rotary", "alibi", "none"),
    "t5": ("relative", "learned", "sinusoidal", "rotary", "none"),
    "vit": ("learned", "sinusoidal", "none"),
}


def check(job: Job) -> None:
    """Raise JobError for the first rule that the job breaks."""
    for rule in RULES:
        rule(job)


def nearest_divisor(of: int, near: int) -> int:
    return min((d for d in range(1, of + 1) if of % d == 0), key=lambda d: abs(d - near))


def check_family(job: Job) -> None:
    """Family and objective go together."""
    m, name = job.model, job.objective.name
    if m.family not in FAMILIES_OF[name]:
        legal = [n for n, families in FAMILIES_OF.items() if m.family in families]
        rule = f"trains {' or '.join(FAMILIES_OF[name])}; the family {m.family} takes {', '.join(legal)}"
        raise JobError("objective.name", name, rule, legal[0])
    if m.positions not in POSITIONS_OF[m.family]:
        rule = f"the family {m.family} has {', '.join(POSITIONS_OF[m.family])}"
        raise JobError("model.positions", m.positions, rule, POSITIONS_OF[m.family][0])
    if m.unique_layers and m.layers % m.unique_layers:
        rule = f"must divide model.layers = {m.layers}"
        raise JobError(
            "model.unique_layers", m.unique_layers, rule, nearest_divisor(m.layers, m.unique_layers)
        )
    if job.objective.masking.pairs != "none" and m.family == "bert" and m.segments < 2:
        rule = "two segments a row (objective.masking.pairs) need two rows of the segment table"
        raise JobError("model.segments", m.segments, rule, 2)


def check_heads(job: Job) -> None:
    """Widths are divisible."""
    m = job.model
    if m.head_dim is None and m.inner_width % m.heads:
        field = "model.bottleneck.hidden" if m.bottleneck.hidden else "model.hidden"
        rule = f"must divide {field} = {m.inner_width}"
        raise JobError("model.heads", m.heads, rule, nearest_divisor(m.inner_width, m.heads))
    if m.heads % m.kv:
        rule = f"must divide model.heads = {m.heads}"
        raise JobError("model.kv_heads", m.kv_heads, rule, nearest_divisor(m.heads, m.kv))
    mae = job.objective.mae
    if job.objective.name == "mae" and mae.hidden % mae.heads:
        rule = f"must divide objective.mae.hidden = {mae.hidden}"
        raise JobError("objective.mae.heads", mae.heads, rule, nearest_divisor(mae.hidden, mae.heads))


def check_positions(job: Job) -> None:
    """Positions suit heads and rows."""
    m = job.model
    if m.positions == "rotary" and m.head_width % 2:
        rule = "rotary positions turn pairs: must be even"
        raise JobError("model.head_dim", m.head_width, rule, m.head_width + 1)
    if m.positions == "sinusoidal" and m.hidden % (4 if m.family == "vit" else 2):
        parts = 4 if m.family == "vit" else 2
        rule = (
            f"sinusoidal positions have sines and cosines{' of two dimensions' if parts == 4 else ''}: "
            + (f"must be a multiple of {parts}")
        )
        raise JobError("model.hidden", m.hidden, rule, -(-m.hidden // parts) * parts)
    rows = max(job.data.seq_len, job.data.target_len or 0)
    if m.family != "vit" and m.positions == "learned" and m.max_positions and rows > m.max_positions:
        rule = (
            f"must not exceed model.max_positions = {m.max_positions}, the rows of the learned position table"
        )
        raise JobError("data.seq_len", rows, rule, m.max_positions)


def check_rotary_scaling(job: Job) -> None:
    """What a way of stretching needs is given, and makes sense."""
    scaling, m = job.model.rotary_scaling, job.model
    if scaling.kind == "none" or m.positions != "rotary":
        return
    name = "model.rotary_scaling"
    if scaling.factor < 1:
        raise JobError(f"{name}.factor", scaling.factor, "rows become longer: must be at least 1", 1.0)
    if scaling.kind == "ntk" and m.head_width < 4:
        rule = "ntk keeps the fastest pair of features and slows the others: needs two pairs"
        raise JobError("model.head_dim", m.head_width, rule, 4)
    if scaling.kind not in ("yarn", "llama3"):
        return
    if scaling.original_length is None:
        rule = f"{scaling.kind} must know the length of the rows that the model was trained on"
        nearest = max(1, int(job.data.seq_len / scaling.factor))
        raise JobError(f"{name}.original_length", None, rule, nearest)
    slow, fast = scaling.slow or 1.0, scaling.fast or (4.0 if scaling.kind == "llama3" else 32.0)
    if fast <= slow:
        raise JobError(f"{name}.fast", fast, f"must exceed {name}.slow = {slow}", 4 * slow)


def check_experts(job: Job) -> None:
    """Routing is possible, and does not look ahead."""
    e = job.model.experts
    if not e.count:
        return
    if e.top_k > e.count:
        rule = f"must not exceed model.experts.count = {e.count}"
        raise JobError("model.experts.top_k", e.top_k, rule, e.count)
    if e.top_k == 1 and e.normalise and e.routing == "tokens":
        rule = "the weight of a single expert would always be 1, and the router would learn nothing from the loss"
        raise JobError("model.experts.normalise", True, rule, False)
    if e.bias_rate and e.routing == "experts":
        rule = "experts that choose their tokens are balanced as they are"
        raise JobError("model.experts.bias_rate", e.bias_rate, rule, 0)
    if e.routing == "experts" and job.model.family in ("gpt", "t5"):
        rule = "experts that choose among a row's tokens look ahead, so not in decoders"
        raise JobError("model.experts.routing", e.routing, rule, "tokens")


def check_bottleneck(job: Job) -> None:
    """Blocks of a kind that there is with a bottleneck."""
    m, b = job.model, job.model.bottleneck
    if b.hidden is None:
        return
    if m.family == "t5" or job.objective.name == "mae":
        rule = "blocks of encoders with a decoder behind them (family t5, objective mae) have no bottleneck"
        raise JobError("model.bottleneck.hidden", b.hidden, rule, None)
    if m.norm_position != "post":
        rule = "with model.bottleneck.hidden, norms stand behind what is added (Sun et al. 2020)"
        raise JobError("model.norm_position", m.norm_position, rule, "post")
    from headway.kernels.attention.registry import mechanism

    for word in m.attention.mechanisms:
        if b.reads != "inside" and mechanism(word).kind == "mixer":
            rule = f"model.attention has {word!r}, which reads one input, of the width inside"
            raise JobError("model.bottleneck.reads", b.reads, rule, "inside")


def check_trigram(job: Job) -> None:
    """Neighbours of a token are its own, and may be seen."""
    m = job.model
    if not m.embedding_trigram:
        return
    if m.family != "bert":
        rule = "a token would be read together with the next one, which only encoders of text may see (family bert)"
        raise JobError("model.embedding_trigram", True, rule, False)
    if job.data.documents == "isolate":
        rule = "with model.embedding_trigram, the tokens at a document's ends are read together with its neighbours'"
        raise JobError("data.documents", "isolate", rule, "attend")


def check_masking(job: Job) -> None:
    """Shares of masked tokens add up to one at most."""
    masking = job.objective.masking
    if masking.mask + masking.random > 1:
        rule = f"with objective.masking.mask = {masking.mask}, must not exceed 1"
        raise JobError("objective.masking.random", masking.random, rule, 1 - masking.mask)


def check_vision(job: Job) -> None:
    """Patches tile the image."""
    m, images = job.model, job.data.images
    if m.family != "vit":
        return
    if images.size % m.vision.patch:
        rule = f"must divide data.images.size = {images.size}"
        raise JobError(
            "model.vision.patch", m.vision.patch, rule, nearest_divisor(images.size, m.vision.patch)
        )
    for name, values in (("mean", images.mean), ("std", images.std)):
        if len(values) not in (1, images.channels):
            rule = f"one value, or one for each of the {images.channels} channels"
            raise JobError(f"data.images.{name}", values, rule, values[:1])
    if job.objective.name == "classify" and job.objective.pool == "first" and not m.vision.class_token:
        raise JobError("objective.pool", "first", "the model has no class token (model.vision)", "mean")
    if m.vision.distill_token:
        _check_distill_token(job)


def _check_distill_token(job: Job) -> None:
    """The token has its place, and a head that reads it."""
    rule = None
    if not job.model.vision.class_token:
        rule = "stands after the class token, which this model lacks (model.vision.class_token = False)"
    elif job.objective.name != "classify":
        rule = f"its head tells classes, of which objective {job.objective.name} has none"
    if rule:
        raise JobError("model.vision.distill_token", True, rule, False)


def check_batch(job: Job) -> None:
    """The ramp ends at the global batch."""
    ramp, full = job.train.ramp, job.train.global_batch
    if ramp.start is None:
        return
    if ramp.start > full:
        raise JobError("train.ramp.start", ramp.start, f"must not exceed train.global_batch = {full}", full)
    if (full - ramp.start) % ramp.increment:
        rule = f"must divide the growth from {ramp.start} to train.global_batch = {full}"
        nearest = nearest_divisor(full - ramp.start, ramp.increment)
        raise JobError("train.ramp.increment", ramp.increment, rule, nearest)
    if ramp.samples is None:
        rule = "must be given with train.ramp.start: samples over which the batch grows"
        raise JobError("train.ramp.samples", None, rule, full * 100)


def check_schedule(job: Job) -> None:
    """Warmup ends before the schedule does."""
    s, steps = job.schedule, job.schedule.steps or job.train.steps
    if s.warmup and s.warmup_tokens:
        rule = f"give warmup in steps or in tokens, not both (schedule.warmup_tokens = {s.warmup_tokens})"
        raise JobError("schedule.warmup", s.warmup, rule, 0)
    if s.warmup >= steps and s.warmup > 0:
        raise JobError(
            "schedule.warmup", s.warmup, f"must be less than the {steps} steps of the schedule", steps - 1
        )


def check_energy(job: Job) -> None:
    """The grid is one that we know."""
    find_grid(job.tracking.energy.grid)


RULES = (
    check_family,
    check_heads,
    check_positions,
    check_rotary_scaling,
    check_attention,
    check_experts,
    check_bottleneck,
    check_trigram,
    check_masking,
    check_vision,
    check_distill,
    check_batch,
    check_schedule,
    check_energy,
)
