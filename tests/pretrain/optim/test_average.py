"""The average of weights against PyTorch's."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from headway.pretrain.optim.average import Average


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))


def walk(module, steps=5):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn(p.shape, generator=generator))
        yield


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.9999])
def test_averages_are_torchs(decay):
    module = model()
    theirs = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay))
    theirs.update_parameters(module)  # their first update copies
    ours = Average(module.named_parameters(), decay)
    for _ in walk(module):
        ours.update()
        theirs.update_parameters(module)
    expected = dict(theirs.module.named_parameters())
    assert list(ours.state()) == list(expected)
    for name, average in ours.state().items():
        assert torch.equal(average, expected[name])


def test_swapping_is_bitwise_and_undone_also_by_an_error():
    module, calls = model(), []
    average = Average(module.named_parameters(), 0.5, changed=lambda: calls.append(1))
    for _ in walk(module):
        average.update()
    weights, averages = copy.deepcopy(dict(module.named_parameters())), copy.deepcopy(average.state())
    pointers = [p.data_ptr() for p in module.parameters()]
    with pytest.raises(KeyError), average.swapped():  # noqa: PT012
        assert all(torch.equal(p, averages[name]) for name, p in module.named_parameters())
        assert all(torch.equal(a, weights[name]) for name, a in average.state().items())
        raise KeyError
    assert all(torch.equal(p, weights[name]) for name, p in module.named_parameters())
    assert all(torch.equal(a, averages[name]) for name, a in average.state().items())
    assert pointers == [p.data_ptr() for p in module.parameters()]  # what holds views of them keeps working
    assert len(calls) == 2


def test_state_is_live_so_that_a_checkpoint_can_be_read_into_it():
    module = model()
    average = Average(module.named_parameters(), 0.5)
    for tensor in average.state().values():
        assert not tensor.requires_grad
        tensor.zero_()
    average.update()
    for name, p in module.named_parameters():
        assert torch.equal(average.state()[name], 0.5 * p)
