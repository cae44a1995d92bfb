"""The learning rate over steps: a factor of the base rate, a pure function of the step.

Steps count from 0, and a step's factor is that of its own update, counted from 1: step 0 of a warmup of w
steps has 1/w (not 0, which would waste it), step w - 1 has 1, and the last step of the schedule has exactly
the floor. Without warmup, step 0 has 1.
"""

from __future__ import annotations

import math

from headway.pretrain.config import Schedule, Train
from headway.pretrain.data.ramp import BatchSizes
from headway.pretrain.errors import JobError

T5_CONSTANT_STEPS = 10_000
"""Steps that T5 stays at the first rate (Raffel et al. 2020, section 3.1.2: 1 / sqrt(max(n, 10^4)))."""


def factor(step: int, schedule: Schedule, total_steps: int) -> float:
    """Factor of the base learning rate at one optimizer step.

    - `constant`: 1 after warmup.
    - `linear`, `cosine`: from 1 at the end of warmup to `floor` at the last step (cosine: Loshchilov and
      Hutter 2017).
    - `inverse_sqrt`: sqrt(w / n) at update n, from 1 at the end of warmup; w = 10,000 without warmup (T5).
    - `wsd`: 1, then linear to `floor` over the last `decay` of the steps (Hu et al. 2024, MiniCPM; Hägele
      et al. 2024).

    Past its last step a schedule stays where it ended.

    Args:
        step: updates done before this one, from 0.
        schedule: the job's `schedule` section, its warmup in steps (see `in_steps`).
        total_steps: where the decay ends, if `schedule.steps` does not say.
    """
    total, warmup = schedule.steps or total_steps, schedule.warmup
    update = step + 1
    if update < warmup:
        return update / warmup
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "inverse_sqrt":
        constant = warmup or T5_CONSTANT_STEPS
        return math.sqrt(constant / max(update, constant))
    begin = max(warmup, 1)
    if schedule.name == "wsd":
        begin = max(begin, total - max(1, round(schedule.decay * total)))
    progress = min(1.0, max(0, update - begin) / max(1, total - begin))
    left = (1 + math.cos(math.pi * progress)) / 2 if schedule.name == "cosine" else 1 - progress
    return schedule.floor + (1 - schedule.floor) * left


def in_steps(schedule: Schedule, train: Train, tokens_per_row: int) -> Schedule:
    """The schedule with its warmup in steps, rounded up, whether it was given so or in tokens.

    Args:
        train: sizes of the global batches, which may grow.
        tokens_per_row: `data.seq_len`.

    Raises:
        JobError: `warmup_tokens` take more steps than there are.
    """
    if schedule.warmup_tokens is None:
        return schedule
    rows = -(-schedule.warmup_tokens // tokens_per_row)
    steps, total = BatchSizes(train).step_of(rows - 1) + 1, schedule.steps or train.steps
    if steps >= total > 1:
        rule = f"takes {steps} steps; must end before the {total} of the schedule"
        most = BatchSizes(train).first(total - 1) * tokens_per_row
        raise JobError("schedule.warmup_tokens", schedule.warmup_tokens, rule, most)
    return schedule.model_copy(update={"warmup": steps, "warmup_tokens": None})
