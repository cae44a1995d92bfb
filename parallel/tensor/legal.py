"""What tensor parallelism asks of a job, checked before a rank starts."""

from __future__ import annotations

from headway.kernels.attention.registry import mechanism
from headway.parallel.mesh import Layout
from headway.pretrain.config import Job
from headway.pretrain.errors import JobError


def check_tensor(job: Job, layout: Layout) -> None:
    """Every rank has whole heads and some features; raises JobError if not."""
    ranks, m, mae = layout.tensor, job.model, job.objective.mae
    if ranks == 1:
        return
    check_mechanisms(job, "tensor", "parallel.tensor", ranks, "this mechanism is not cut by heads")
    heads = [("model.heads", m.heads)]
    if job.objective.name == "mae":
        heads.append(("objective.mae.heads", mae.heads))
    for field, count in heads:
        if count % ranks:
            raise JobError("parallel.tensor", ranks, f"must divide {field} = {count}", _divisor(count, ranks))
    if m.kv % ranks and ranks % m.kv:
        rule = f"must divide model.kv_heads = {m.kv}, or be a multiple of it: ranks then share a head"
        raise JobError("parallel.tensor", ranks, rule, _divisor(m.kv, ranks))
    widths = {"model.ffn": m.ffn_width}
    if m.experts.count and layout.expert == 1:
        widths["model.experts.ffn"] = m.experts.ffn or m.ffn_width
    if job.objective.name == "mae":
        widths["objective.mae.hidden"] = mae.hidden
    for field, width in widths.items():
        if -(-width // ranks) * (ranks - 1) >= width:
            rule = f"{field} = {width} leaves a rank without features"
            raise JobError("parallel.tensor", ranks, rule, _divisor(width, ranks))


def check_mechanisms(job: Job, need: str, field: str, value: int, why: str) -> None:
    """Raise JobError if a mechanism of the model cannot be spread along an axis."""
    for word in job.model.attention.mechanisms:
        if need not in mechanism(word).supports:
            raise JobError(field, value, f"model.attention has {word!r}: {why}", 1)


def _divisor(of: int, near: int) -> int:
    """The largest divisor that is not above `near`."""
    return max(d for d in range(1, near + 1) if of % d == 0)
