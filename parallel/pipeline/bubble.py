"""Idle share of a pipeline's step, by formula. A planner uses these; tests hold torch's schedules against them.

Stages are equal and sending takes no time. A forward and each half of the backward (of activations, of weights) of a
stage take one unit of time; p ranks, v stages a rank, m micro-batches.
"""

from __future__ import annotations


def idle_units(schedule: str, ranks: int, virtual: int = 1) -> float:
    """Units of time that a rank waits in a step, whatever the number of micro-batches.

    F, I, W: a forward, a backward of activations, one of weights; B = I + W.

    GPipe (Huang et al. 2019) and 1F1B (Narayanan et al. 2021, section 2.2.1): (p - 1)(F + B). Interleaved 1F1B
    (section 2.2.2): as many units, of stages a v-th as long. Interleaved zero bubble: (p - 1)(F + I - W), ZB-H1 of
    Qi et al. 2024 over more stages. ZB-V (Qi et al., section 6; 2 p - 1 micro-batches or more): p - 1, for ranks begin
    one after the other and wait no more. DualPipeV (DeepSeek 2025): (p - 1)(F&B + B - 3 W), with F&B = F + B where
    nothing overlaps.
    """
    steps = ranks - 1
    return {
        "gpipe": 3 * steps,
        "1f1b": 3 * steps,
        "interleaved_1f1b": 3 * steps,
        "interleaved_zero_bubble": steps,
        "zbv": steps,
        "dualpipev": 2 * steps,
    }[schedule]


def idle_share(schedule: str, ranks: int, micro_batches: int, virtual: int = 1) -> float:
    """Share of a step that a rank waits: idle / (idle + 3 m v)."""
    idle = idle_units(schedule, ranks, virtual)
    return idle / (idle + 3 * micro_batches * virtual)
