"""Cross-entropy over a vocabulary that is spread, against the one of a single process."""

import pytest
import torch

from headway.kernels.cross_entropy import IGNORE, Options, linear_cross_entropy

VOCAB, WIDTH, ROWS = 67, 8, 50


def inputs():
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=draw, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, generator=draw, dtype=torch.float64)
    bias = torch.randn(VOCAB, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, VOCAB, (ROWS,), generator=draw)
    labels[::7] = IGNORE
    weight[60] = weight[3]  # a tie between words of two ranks: the first wins
    bias[60] = bias[3]
    return hidden, weight, bias, labels


def spread(rank, world, options):
    """Losses, and gradients of hidden states and of this rank's words."""
    import torch.distributed as dist

    from headway.parallel.tensor.collectives import enter
    from headway.parallel.tensor.vocabulary import row_loss_over

    hidden, weight, bias, labels = inputs()
    group = dist.group.WORLD.group_name
    step = -(-VOCAB // world)
    part, part_bias = (x[rank * step :][:step].clone().requires_grad_() for x in (weight, bias))
    compute = row_loss_over(rank * step, VOCAB, group)
    losses = linear_cross_entropy(
        enter(hidden, group), part, labels, Options(*options), 16, compute, part_bias
    )
    losses.total.backward()
    found = [x.detach().numpy() for x in losses]
    return found, hidden.grad.numpy(), part.grad.numpy(), part_bias.grad.numpy()


@pytest.mark.parametrize("options", [(), (1e-2, 0.0, True), (1e-3, 0.1, True)])
@pytest.mark.parametrize("ranks", [2, 3])
def test_losses_and_gradients_are_those_of_one_process(pool, ranks, options):
    hidden, weight, bias, labels = inputs()
    weight.requires_grad_()
    bias.requires_grad_()
    losses = linear_cross_entropy(hidden, weight, labels, Options(*options), 16, None, bias)
    losses.total.backward()
    step = -(-VOCAB // ranks)
    for rank, (found, *gradients) in enumerate(pool(spread, ranks=ranks, options=options)):
        mine = slice(rank * step, (rank + 1) * step)
        expected = [hidden.grad, weight.grad[mine], bias.grad[mine]]
        # fp64, sums of 67 terms in another order
        torch.testing.assert_close([torch.from_numpy(x) for x in found], list(losses), rtol=1e-12, atol=1e-12)
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-11, atol=1e-12)
