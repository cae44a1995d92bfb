"""Dropout by coordinates: its mean, and that it is a function of coordinates alone."""

import math

import pytest
import torch

from headway.kernels import random
from headway.kernels.dropout import dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean(p):
    key, n = torch.tensor(random.key(0, "d")), 8 * 64 * 515
    coordinates = (torch.arange(8)[:, None], torch.arange(64)[None], 0)
    y = dropout(torch.ones(8, 64, 515), p, key, coordinates)
    kept = (y != 0).double().mean()
    # 5 deviations of a binomial share, and the rounding of p to 2^-16.
    assert abs(kept - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n) + 2**-16
    assert y.max().item() == pytest.approx(1 / (1 - p), rel=2e-4)


def test_dropout_depends_on_coordinates_alone():
    key, x = torch.tensor(random.key(0, "d")), torch.randn(6, 10, 24)
    slots, places = torch.arange(6)[:, None], torch.arange(10)[None]
    whole = dropout(x, 0.4, key, (slots, places, 0))
    parts = [dropout(x[a:b], 0.4, key, (slots[a:b], places, 0)) for a, b in ((0, 1), (1, 4), (4, 6))]
    assert torch.equal(whole, torch.cat(parts))
    later = dropout(x[:, 5:], 0.4, key, (slots, places[:, 5:], 0))
    assert torch.equal(whole[:, 5:], later)
    assert not torch.equal(whole, dropout(x, 0.4, key + 1, (slots, places, 0)))


def test_a_residual_is_added():
    key, x, residual = torch.tensor(random.key(0, "d")), torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    coordinates = (torch.arange(2)[:, None], torch.arange(3)[None], 0)
    found = dropout(x, 0.4, key, coordinates, residual)
    assert torch.equal(found, residual + dropout(x, 0.4, key, coordinates))
