"""Graph attention against torch-geometric's layers, and edge lists against dense masks."""

import pytest
import torch

from headway.kernels.attention.grids import graph
from headway.tests import oracles
from headway.tests.kernels.attention.test_kernels import Largest

ROUNDINGS = {"rtol": 1e-11, "atol": 1e-11}
"""fp64: sums of up to 40 terms of order 1, in another order."""
KERNELS = [(graph.attention, graph.reference), (graph.attention_v2, graph.reference_v2)]


def nodes(count=23, heads=3, dim=4, dtype=torch.float64):
    """h, asking [2, N, H, D] and two vectors [H, D]."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, count, heads, dim)] * 2 + [(heads, dim)] * 2
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes
    ]


def random_edges(count=23, chance=0.2):
    linked = torch.rand(count, count, generator=torch.Generator().manual_seed(2)) < chance
    linked[:, count // 4] = False  # a node that no edge reaches
    return linked.nonzero().mT.contiguous()


def arguments(compute, h, asking, source, target):
    """What a kernel takes beside h and the edges, and the inputs that get gradients."""
    own = (asking, source) if compute in KERNELS[1] else (source, target)
    return own, [h, *own]


def value_and_gradients(compute, given, edges, seen=None):
    own, inputs = arguments(compute, *given)
    out = compute(given[0], edges, *own, seen)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))


@pytest.mark.parametrize("compute", [k for pair in KERNELS for k in pair])
def test_it_is_torch_geometrics(compute):
    oracles.package_folder("torch_geometric")
    from torch_geometric.nn import GATConv, GATv2Conv

    given, edges = nodes(), random_edges()
    h, asking, source, target = given
    second = compute in KERNELS[1]
    # Their weights are identities, so that they are given W h; a second matrix comes with GATv2 alone.
    module = (GATv2Conv if second else GATConv)(
        (12, 12) if second else 12, 4, 3, add_self_loops=False, bias=False
    )
    module = module.double()
    lin = (module.lin_l, module.lin_r) if second else (module.lin,)
    with torch.no_grad():
        for layer in lin:
            layer.weight.copy_(torch.eye(12))
            if layer.bias is not None:
                layer.bias.zero_()
    for name, value in (("att", source),) if second else (("att_src", source), ("att_dst", target)):
        delattr(module, name)
        setattr(module, name, value.unsqueeze(0))
    ours = value_and_gradients(compute, given, edges)
    rows = []
    for b in range(2):
        x = (h[b].flatten(1), asking[b].flatten(1)) if second else h[b].flatten(1)
        rows.append(module(x, edges).unflatten(1, (3, 4)))
    theirs = torch.stack(rows)
    upstream = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    _, inputs = arguments(compute, *given)
    # torch-geometric adds 1e-16 to the softmax's sums.
    torch.testing.assert_close(ours, (theirs, *torch.autograd.grad(theirs, inputs, upstream)), **ROUNDINGS)
    assert (ours[0][:, 5] == 0).all()


@pytest.mark.parametrize("seen", [None, "some"])
@pytest.mark.parametrize(("fast", "reference"), KERNELS)
def test_edges_are_the_dense_mask(fast, reference, seen):
    edges, given = random_edges(), nodes()
    if seen is not None:
        seen = torch.rand(2, edges.shape[1], generator=torch.Generator().manual_seed(4)) < 0.5
    ours, theirs = (value_and_gradients(f, given, edges, seen) for f in (fast, reference))
    torch.testing.assert_close(ours, theirs, **ROUNDINGS)


@pytest.mark.parametrize("compute", [graph.attention, graph.attention_v2])
def test_gradients(compute):
    _, inputs = arguments(compute, *nodes(5, 2, 2))
    edges = random_edges(5, 0.5)[:, :7]
    assert torch.autograd.gradcheck(lambda h, *own: compute(h, edges, *own), inputs)


@pytest.mark.parametrize(("fast", "reference"), KERNELS)
def test_bf16_is_as_good_as_bf16_can_be(fast, reference):
    given, edges = nodes(dtype=torch.bfloat16), random_edges()
    exact = value_and_gradients(reference, [t.detach().double().requires_grad_() for t in given], edges)
    for got, want in zip(value_and_gradients(fast, given, edges), exact, strict=True):
        # Scores are rounded three times (product, sum over D, sum of two halves): each is off by 2^-9 of up to 8, and
        # so are weights, relative to themselves.
        assert (got.double() - want).norm() / want.norm() < 8 * 3 * 2**-9


@pytest.mark.parametrize("compute", [graph.attention, graph.attention_v2])
def test_memory_grows_with_the_edges(compute):
    length, distance = 1024, 16
    edges = graph.near_in_row(length, distance, True, torch.device("cpu"))
    own, inputs = arguments(compute, *nodes(length, 2, 8, torch.float32))
    with Largest() as largest:
        compute(inputs[0], edges, *own).sum().backward()
    # Scores of edges, 17 a node: features of edges would be 4 times as many, the square of nodes 30 times.
    assert largest.elements <= 2 * 2 * 17 * length


def naive(length, near):
    return {(j, i) for i in range(length) for j in range(length) if near(i, j)}


@pytest.mark.parametrize("distance", [0, 1, 3, 50])
def test_neighbours_in_a_row(distance):
    device = torch.device("cpu")
    for causal in (False, True):
        edges = graph.near_in_row(9, distance, causal, device)
        expected = naive(9, lambda i, j: abs(i - j) <= distance and (j <= i or not causal))  # noqa: B023
        assert sorted(map(tuple, edges.T.tolist())) == sorted(expected)
    assert graph.pairs(9, distance) == edges_of(9, distance)


def edges_of(length, distance):
    return graph.near_in_row(length, distance, False, torch.device("cpu")).shape[1]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("distance", [0, 1, 2, 9])
def test_neighbours_in_a_grid(distance, first):
    def near(i, j):
        if min(i, j) < first:
            return True
        (a, b), (c, d) = (divmod(n - first, 4) for n in (i, j))
        return max(abs(a - c), abs(b - d)) <= distance

    edges = graph.near_in_grid(4, distance, first, torch.device("cpu"))
    assert sorted(map(tuple, edges.T.tolist())) == sorted(naive(16 + first, near))
