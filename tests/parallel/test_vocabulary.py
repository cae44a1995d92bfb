"""Cross-entropy and soft targets over a vocabulary that is spread, against the one of a single process."""

import pytest
import torch

from headway.kernels.cross_entropy import IGNORE, Options, linear_cross_entropy
from headway.kernels.soft_targets import DIVERGENCES, FullTeacher, Soft, TopTeacher

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


def teacher(k):
    """Of all words, or of the k likeliest; for the first row these are the last k, all of the last rank."""
    draw = torch.Generator().manual_seed(1)
    full = FullTeacher(*(torch.randn(n, 5, generator=draw, dtype=torch.float64) for n in (ROWS, VOCAB)))
    if k is None:
        return full
    logits = full.hidden_NT @ full.weight_VT.T
    logits[0, -k:] += 20
    return TopTeacher(*logits.topk(k), (logits / 2).logsumexp(1))


def spread(rank, world, options, soft=None, k=None, compiled=False):
    """Losses, and gradients of hidden states and of this rank's words."""
    import torch.distributed as dist

    from headway.parallel.tensor.collectives import enter
    from headway.parallel.tensor.vocabulary import row_loss_over, soft_row_loss_over

    hidden, weight, bias, labels = inputs()
    group = dist.group.WORLD.group_name
    step = -(-VOCAB // world)
    part, part_bias = (x[rank * step :][:step].clone().requires_grad_() for x in (weight, bias))
    compute = row_loss_over(rank * step, VOCAB, group)
    taught = None if soft is None else teacher(k)
    if isinstance(taught, FullTeacher):
        taught = taught._replace(weight_VT=taught.weight_VT[rank * step :][:step])
    compute_soft = soft_row_loss_over(rank * step, group)
    if compiled:
        compute_soft = torch.compile(compute_soft, fullgraph=True)
    how = soft and Soft(*soft), taught, compute_soft
    chunk = None if compiled else 16  # one shape, one graph
    losses = linear_cross_entropy(
        enter(hidden, group), part, labels, Options(*options), chunk, compute, part_bias, *how
    )
    losses.total.backward()
    found = [x.detach().numpy() for x in losses]
    return found, hidden.grad.numpy(), part.grad.numpy(), part_bias.grad.numpy()


def check(pool, ranks, options, soft=None, k=None, compiled=False):
    """All ranks' losses and gradients against those of one process."""
    hidden, weight, bias, labels = inputs()
    weight.requires_grad_()
    bias.requires_grad_()
    how = (None, None) if soft is None else (Soft(*soft), teacher(k))
    losses = linear_cross_entropy(hidden, weight, labels, Options(*options), 16, None, bias, *how)
    losses.total.backward()
    step = -(-VOCAB // ranks)
    answers = pool(spread, ranks=ranks, options=options, soft=soft, k=k, compiled=compiled)
    for rank, (found, *gradients) in enumerate(answers):
        mine = slice(rank * step, (rank + 1) * step)
        expected = [hidden.grad, weight.grad[mine], bias.grad[mine]]
        # fp64, sums of 67 terms in another order
        torch.testing.assert_close([torch.from_numpy(x) for x in found], list(losses), rtol=1e-12, atol=1e-12)
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("options", [(), (1e-2, 0.0, True), (1e-3, 0.1, True)])
@pytest.mark.parametrize("ranks", [2, 3])
def test_losses_and_gradients_are_those_of_one_process(pool, ranks, options):
    check(pool, ranks, options)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("k", [None, 4, VOCAB])
@pytest.mark.parametrize("ranks", [2, 3])
def test_soft_targets_are_those_of_one_process(pool, ranks, k, kind):
    check(pool, ranks, (1e-3,), (2.0, kind, 0.7, 0.3), k)


@pytest.mark.slow
@pytest.mark.matrix
def test_soft_targets_compiled_over_ranks(pool):
    check(pool, 2, (), (2.0, "js", 0.7, 0.3), 4, compiled=True)
