"""Schedules against Hugging Face's and PyTorch's, and their conventions."""

import itertools

import pytest
import torch
import transformers

from headway.pretrain.config import Schedule, Train
from headway.pretrain.errors import JobError
from headway.pretrain.optim.schedules import factor, in_steps

TOTAL = 50


def ours(schedule, total=TOTAL, tokens_per_row=1):
    settled = in_steps(schedule, Train(steps=total, global_batch=1), tokens_per_row)
    return [factor(step, settled, total) for step in range(total)]


def rates(make, steps=TOTAL):
    """Rates of a PyTorch scheduler at base rate 1, after 1, 2, ... updates: our factors count like that."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, out = make(optimizer), []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        out.append(scheduler.get_last_lr()[0])
    return out


HF = {
    "constant": lambda o: transformers.get_constant_schedule_with_warmup(o, 7),
    "linear": lambda o: transformers.get_linear_schedule_with_warmup(o, 7, TOTAL),
    "cosine": lambda o: transformers.get_cosine_schedule_with_warmup(o, 7, TOTAL),
    "inverse_sqrt": lambda o: transformers.get_inverse_sqrt_schedule(o, 7),
    "wsd": lambda o: transformers.get_wsd_schedule(
        o, num_warmup_steps=7, num_decay_steps=10, num_training_steps=TOTAL, decay_type="linear"
    ),
}


@pytest.mark.parametrize("name", HF)
def test_factors_are_hugging_faces(name):
    mine = ours(Schedule(name=name, warmup=7, floor=0.0, decay=0.2))
    assert mine == pytest.approx(rates(HF[name]), abs=1e-12)


def test_cosine_with_a_floor_is_pytorchs():
    def make(optimizer):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=TOTAL - 1, eta_min=0.1)

    assert ours(Schedule(name="cosine", floor=0.1))[1:] == pytest.approx(rates(make, TOTAL - 1), abs=1e-12)


def test_warmup_and_linear_with_a_floor_are_pytorchs():
    def make(optimizer):
        lrs = torch.optim.lr_scheduler
        warmup = lrs.LinearLR(optimizer, start_factor=0.1, end_factor=1.0, total_iters=9)
        decay = lrs.LinearLR(optimizer, start_factor=1.0, end_factor=0.25, total_iters=TOTAL - 10)
        return lrs.SequentialLR(optimizer, [warmup, decay], milestones=[9])

    mine = ours(Schedule(name="linear", warmup=10, floor=0.25))
    assert mine[0] == 0.1
    assert mine[1:] == pytest.approx(rates(make, TOTAL - 1), abs=1e-12)


@pytest.mark.parametrize("name", HF)
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_conventions(name, warmup):
    schedule = Schedule(name=name, warmup=warmup, floor=0.1)
    f = ours(schedule)
    assert f[0] == (1 / warmup if warmup else 1.0)
    assert f[max(warmup - 1, 0)] == 1.0
    assert max(f) == 1.0
    after = f[max(warmup - 1, 0) :]
    assert all(a >= b for a, b in itertools.pairwise(after))
    if name in ("cosine", "linear", "wsd"):
        assert f[-1] == pytest.approx(0.1, abs=1e-15)
        assert factor(10 * TOTAL, schedule, TOTAL) == pytest.approx(0.1, abs=1e-15)


def test_inverse_sqrt_is_continuous_and_t5s():
    schedule = Schedule(name="inverse_sqrt", warmup=100)
    assert factor(99, schedule, 1000) == 1.0
    assert factor(100, schedule, 1000) == pytest.approx((100 / 101) ** 0.5)
    t5 = Schedule(name="inverse_sqrt")
    assert factor(9_999, t5, 10**6) == 1.0
    assert 0.01 * factor(39_999, t5, 10**6) == pytest.approx(1 / 40_000**0.5)


def test_wsd_spends_its_share_on_the_decay():
    f = ours(Schedule(name="wsd", warmup=5, decay=0.3, floor=0.0), total=100)
    assert f[4:70] == [1.0] * 66
    assert f[70:] == pytest.approx([1 - k / 30 for k in range(1, 31)], abs=1e-12)


def test_warmup_in_tokens_is_warmup_in_steps():
    in_steps = ours(Schedule(warmup=5))
    assert ours(Schedule(warmup_tokens=5 * 1024), tokens_per_row=1024) == in_steps
    assert ours(Schedule(warmup_tokens=4 * 1024 + 1), tokens_per_row=1024) == in_steps


def test_warmup_in_tokens_beyond_the_end_is_refused():
    with pytest.raises(JobError, match=r"schedule\.warmup_tokens = 51200: takes 50 steps") as error:
        ours(Schedule(warmup_tokens=50 * 1024), tokens_per_row=1024)
    assert ours(Schedule(warmup_tokens=error.value.nearest), tokens_per_row=1024)[0] == 1 / 49


def test_the_schedule_may_end_before_the_run():
    assert ours(Schedule(steps=20), total=50)[:20] == ours(Schedule(), total=20)
    assert ours(Schedule(steps=20), total=50)[20:] == pytest.approx([0.1] * 30)


@pytest.mark.parametrize("name", HF)
def test_a_run_of_one_step_has_the_full_rate(name):
    assert ours(Schedule(name=name), total=1) == [1.0]
