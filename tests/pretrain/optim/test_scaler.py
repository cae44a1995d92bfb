"""The loss scale follows the sequence of torch.amp.GradScaler."""

import random

import pytest
import torch

from headway.pretrain.errors import NonFiniteError
from headway.pretrain.optim.scaler import LossScale


def grad_scaler_sequence(overflows, **settings):
    scaler = torch.amp.GradScaler("cpu", **settings)
    p = torch.zeros(1, requires_grad=True)
    optimizer, out = torch.optim.SGD([p], lr=0.0), []
    for overflow in overflows:
        scaler.scale(p.sum() * 0)  # creates the scale
        p.grad = torch.tensor([float("inf") if overflow else 1.0])
        scaler.step(optimizer)
        scaler.update()
        out.append((scaler.get_scale(), scaler._get_growth_tracker()))
    return out


def our_sequence(overflows, scale):
    out = []
    for overflow in overflows:
        scale.update(overflow)
        out.append((scale.scale, scale.good_steps))
    return out


@pytest.mark.parametrize("seed", range(3))
def test_the_sequence_is_grad_scalers(seed):
    rng = random.Random(seed)
    overflows = [rng.random() < 0.15 for _ in range(200)]
    theirs = grad_scaler_sequence(overflows, init_scale=1024.0, growth_interval=4)
    assert our_sequence(overflows, LossScale(scale=1024.0, interval=4)) == theirs


def test_defaults_are_grad_scalers():
    scaler, ours = torch.amp.GradScaler("cpu"), LossScale()
    assert ours.scale == scaler._init_scale
    assert ours.interval == scaler.get_growth_interval()
    assert (ours.growth, ours.backoff) == (scaler.get_growth_factor(), scaler.get_backoff_factor())


def test_growth_stops_before_fp32_overflows_as_grad_scalers_does():
    theirs = grad_scaler_sequence([False] * 6, init_scale=2.0**125, growth_interval=1)
    assert our_sequence([False] * 6, LossScale(scale=2.0**125, interval=1)) == theirs


def test_a_saved_scale_goes_on():
    scale = LossScale(scale=8.0, interval=3)
    our_sequence([False, True, False, False], scale)
    again = LossScale(interval=3)
    again.load(scale.state())
    assert our_sequence([False, True, False], again) == our_sequence([False, True, False], scale)


def test_a_gradient_that_is_never_finite_is_an_error():
    scale = LossScale()
    with pytest.raises(NonFiniteError, match="not finite even at a loss scale"):
        our_sequence([True] * 100, scale)
