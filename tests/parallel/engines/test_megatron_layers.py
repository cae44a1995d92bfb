"""Megatron-Core's layers, mappings and cross-entropy in the places of ours, against torch in one process."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

from headway.kernels.cross_entropy import IGNORE, Options, linear_cross_entropy
from headway.tests.parallel.engines.megatron_ranks import groups

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")

B, S, E, F, V = 2, 5, 6, 7, 11  # of outputs, inputs and words the first rank has one more


def config():
    from headway.parallel.engines.megatron.guards import exact

    return exact(
        num_layers=1, hidden_size=E, num_attention_heads=2, tensor_model_parallel_size=2,
        use_cpu_initialization=True, perform_initialization=False,
    )  # fmt: skip


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def halves(tensor, rank, dim):
    return nn.Parameter(tensor.chunk(2, dim)[rank].contiguous())


# -- linears and regions ---------------------------------------------------------------------------------------


def linears(rank, world, sequence):
    """y, and gradients of x and of the parts, of two linears in a region: relu between them."""
    with groups(tensor_model_parallel_size=2):
        from megatron.core import parallel_state

        from headway.parallel.engines.megatron import regions
        from headway.parallel.engines.megatron.layers import linear_classes
        from headway.parallel.tensor.collectives import Columns, part, whole

        team = parallel_state.get_tensor_model_parallel_group()
        columns = Columns(torch.distributed.group.WORLD.group_name, 2, rank, S)
        up, down = nn.Linear(E, F, device="meta"), nn.Linear(F, E, device="meta")
        up.weight, up.bias = halves(drawn(F, E, seed=1), rank, 0), halves(drawn(F, seed=2), rank, 0)
        down.weight, down.bias = halves(drawn(E, F, seed=3), rank, 1), nn.Parameter(drawn(E, seed=4))

        def out(y):
            return regions.leave_columns(y, columns, team) if sequence else regions.leave(y, team)

        kinds = linear_classes("cpu")
        first, second = kinds.column(up, config(), team), kinds.row(down, config(), team, out)
        x = drawn(B, S, E).requires_grad_()
        if sequence:
            entered = regions.enter_columns(part(x, columns), columns, team)
        else:
            entered = regions.enter(x, team)
        y = second(torch.relu(first(entered)))
        y = whole(y, columns) if sequence else y
        (y * drawn(B, S, E, seed=5)).sum().backward()
        return [t.detach().numpy() for t in (y, x.grad, up.weight.grad, up.bias.grad, down.weight.grad)]


@pytest.mark.parametrize("sequence", [False, True])
def test_linears(pool, sequence):
    """Outputs of which ranks have unlike numbers; five columns over two ranks. fp32: sums of 7 in two parts."""
    up, down, x = nn.Linear(E, F), nn.Linear(F, E), drawn(B, S, E).requires_grad_()
    values = drawn(F, E, seed=1), drawn(F, seed=2), drawn(E, F, seed=3), drawn(E, seed=4)
    with torch.no_grad():
        for parameter, value in zip((*up.parameters(), *down.parameters()), values, strict=True):
            parameter.copy_(value)
    y = down(torch.relu(up(x)))
    (y * drawn(B, S, E, seed=5)).sum().backward()
    for rank, found in enumerate(pool(linears, ranks=2, sequence=sequence)):
        cut = [(up.weight.grad, 0), (up.bias.grad, 0), (down.weight.grad, 1)]
        expected = [y.detach(), x.grad, *(g.chunk(2, dim)[rank] for g, dim in cut)]
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-5)


def strided(rank, world):
    """The gradient behind a region whose gradient comes with other strides: Megatron's way, and ours."""
    with groups(tensor_model_parallel_size=2):
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import mappings

        from headway.parallel.engines.megatron import regions

        team, found = parallel_state.get_tensor_model_parallel_group(), []
        for enter in (mappings.copy_to_tensor_model_parallel_region, regions.enter):
            x = torch.ones(3, 2, requires_grad=True)
            (enter(x, team).t() * torch.arange(6.0).view(2, 3)).sum().backward()
            found.append(x.grad.numpy())
        return found


def test_gradients_with_other_strides_are_summed(pool):
    """Megatron all-reduces a contiguous copy of them and goes on with what it was given: it sums nothing. Ours are sums
    of two ranks."""
    alone = np.arange(6.0).reshape(2, 3).T
    for theirs, ours in pool(strided, ranks=2):
        np.testing.assert_array_equal(theirs, alone)
        np.testing.assert_array_equal(ours, 2 * alone)


def shared_gradient(rank, world):
    """y plus x behind a region, which get the same gradient: Megatron's way, and ours."""
    with groups(tensor_model_parallel_size=2):
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import mappings

        from headway.parallel.engines.megatron import regions

        team, found = parallel_state.get_tensor_model_parallel_group(), []
        for enter in (mappings.copy_to_tensor_model_parallel_region, regions.enter):
            x, y = (torch.ones(2, requires_grad=True) for _ in range(2))
            ((y * 1 + enter(x * 1, team)) * torch.tensor([1.0, 2.0])).sum().backward()
            found.append((x.grad.tolist(), y.grad.tolist()))
        return found


def test_gradients_that_others_have_too_are_left_alone(pool):
    """Megatron all-reduces them in place, and y's is doubled with x's."""
    for theirs, ours in pool(shared_gradient, ranks=2):
        assert theirs == ([2.0, 4.0], [2.0, 4.0])
        assert ours == ([2.0, 4.0], [1.0, 2.0])


# -- words -----------------------------------------------------------------------------------------------------


def words(rank, world):
    """Rows of a table, and the gradient of this rank's."""
    with groups(tensor_model_parallel_size=2):
        from megatron.core import parallel_state

        from headway.parallel.engines.megatron.layers import Table

        table = nn.Embedding(V, E, device="meta")
        table.weight = halves(drawn(V, E), rank, 0)
        team = parallel_state.get_tensor_model_parallel_group()
        made = Table(table, rank * 6, config(), team)
        rows = made(torch.tensor([[0, 5, 6], [10, 3, 5]]))
        (rows * drawn(2, 3, E, seed=1)).sum().backward()
        return rows.detach().numpy(), made.weight.grad.numpy(), made.num_embeddings


def test_table(pool):
    weight = drawn(V, E).requires_grad_()
    rows = nn.functional.embedding(torch.tensor([[0, 5, 6], [10, 3, 5]]), weight)
    (rows * drawn(2, 3, E, seed=1)).sum().backward()
    for rank, (found, gradient, count) in enumerate(pool(words, ranks=2)):
        np.testing.assert_array_equal(found, rows.detach().numpy())
        np.testing.assert_array_equal(gradient, weight.grad.chunk(2)[rank].numpy())
        assert count == V


def scored(dtype):
    """Hidden states, head, bias, labels."""
    labels = torch.randint(0, V, (9,), generator=torch.Generator().manual_seed(3))
    labels[2] = IGNORE
    return drawn(9, E).to(dtype), drawn(V, E, seed=1).to(dtype), drawn(V, seed=2).to(dtype), labels


def losses(rank, world, dtype, options):
    with groups(tensor_model_parallel_size=2):
        from headway.parallel.engines.megatron.vocabulary import row_loss_by_megatron
        from headway.parallel.tensor.collectives import enter
        from headway.parallel.tensor.vocabulary import row_loss_over

        hidden, weight, bias, labels = scored(dtype)
        name = torch.distributed.group.WORLD.group_name
        hidden.requires_grad_()
        part, part_bias = halves(weight, rank, 0), halves(bias, rank, 0)
        compute = row_loss_by_megatron(6, row_loss_over(rank * 6, V, name))
        found = linear_cross_entropy(
            enter(hidden, name), part, labels, Options(*options), 4, compute, part_bias
        )
        found.total.backward()
        gradients = [g.grad.float().numpy() for g in (hidden, part, part_bias)]
        return [t.detach().float().numpy() for t in found], gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [(), (1e-2, 0.1, True)])
def test_cross_entropy(pool, dtype, options):
    """Eleven words over two ranks; z-loss, smoothing and accuracy are ours. bf16: logits are rounded alike, their
    gradients and sums over two halves of the words to 2^-8."""
    hidden, weight, bias, labels = scored(dtype)
    for tensor in (hidden, weight, bias):
        tensor.requires_grad_()
    alone = linear_cross_entropy(hidden, weight, labels, Options(*options), 4, None, bias)
    alone.total.backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for rank, (found, gradients) in enumerate(pool(losses, ranks=2, dtype=dtype, options=options)):
        for ours, theirs in zip(found, alone, strict=True):
            np.testing.assert_allclose(ours, theirs.detach().float().numpy(), rtol=1e-5, atol=1e-5)
        whole = hidden.grad, weight.grad.chunk(2)[rank], bias.grad.chunk(2)[rank]
        for ours, theirs in zip(gradients, whole, strict=True):
            np.testing.assert_allclose(ours, theirs.float().numpy(), rtol=tolerance, atol=tolerance)
