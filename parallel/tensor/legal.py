"""What tensor parallelism asks of a job, checked before a rank starts."""

from __future__ import annotations

from headway.parallel.mesh import Layout
from headway.pretrain.config import Job
from headway.pretrain.errors import JobError


def check_tensor(job: Job, layout: Layout) -> None:
    """Every rank has whole heads and some features; raises JobError if not."""
    ranks, m, mae = layout.tensor, job.model, job.objective.mae
    if ranks == 1:
        return
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


def _divisor(of: int, near: int) -> int:
    """The largest divisor that is not above `near`."""
    return max(d for d in range(1, near + 1) if of % d == 0)
