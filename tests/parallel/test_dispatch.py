"""Tokens to experts on other ranks and back: outputs and gradients of one process, whoever has no token."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

from headway.kernels.experts import Pairs, Weights, reference
from headway.parallel import expert, mesh
from headway.parallel.apply import local_slice
from headway.pretrain import config
from headway.pretrain.models.init import initialise
from headway.pretrain.models.moe import MoE
from headway.pretrain.optim.sharded import local

E, F, X, S = 12, 20, 4, 14


def draw(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def start(rank, world, parallel):
    job = config.Job(parallel=config.Parallel(**parallel))
    layout = mesh.lay_out(job.parallel, world)
    return mesh.start(job, layout, rank, world, rank, torch.device("cpu"), "gloo")


def layer(here=None, dtype=torch.float64, bias=True, **experts):
    """The same layer on one process, or spread over ranks."""
    settings = {"count": X, "ffn": F, **experts}
    model = config.Model(
        hidden=E, heads=3, activation="swiglu", bias=bias, experts=config.Experts(**settings),
        init=config.Init(scheme="normal", std=0.5),
    )  # fmt: skip
    with torch.device("meta"):
        built = MoE(model).to(dtype)
    if here:
        expert.spread(built, here)
    built.to_empty(device="cpu")
    initialise(built, model, seed=0, slice_of=local_slice)
    with torch.no_grad():  # biases begin at zero
        for name in ("up_bias", "down_bias", "gate_bias"):
            if (b := getattr(built, name)) is not None:
                whole = draw(3, X, b.shape[1], dtype=dtype)
                first = here.experts.get_local_rank("expert") * len(local(b)) if here else 0
                local(b).copy_(whole[first : first + len(local(b))])
    return built


def pick(built):
    return Weights(*(getattr(built, n) for n in ("up", "down", "gate", "up_bias", "down_bias", "gate_bias")))


def same_gradients(here, spread_out, alone, exact):
    """Of experts: the whole batch's on one process, against this rank's, summed over the ranks that have the same."""
    for name in expert.ROUTED:
        p, q = getattr(spread_out, name), getattr(alone, name)
        if p is None:
            continue
        mine = local(p.grad).clone()  # there, also where this rank's experts had no token
        dist.all_reduce(mine, group=here.experts.get_group("copies"))
        whole = q.grad.clone()
        dist.all_reduce(whole)
        whole /= here.layout.tensor  # ranks along it hold the same tokens
        first = here.experts.get_local_rank("expert") * len(mine)
        torch.testing.assert_close(mine, whole[first : first + len(mine)], **exact)


# Sums of up to 60 numbers of order ten in another order.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def hand_made(rank, world, parallel, tokens, experts, kernel):
    """Pairs that no router would make: `experts` of all pairs, or any for -1; `tokens` of each data rank."""
    here = start(rank, world, parallel)
    settings = {"kernel": kernel, "capacity": 1.0}
    ours, alone = layer(here, **settings), layer(**settings)
    data_rank = rank // here.layout.tensor
    n = tokens[data_rank]
    numbers = torch.Generator().manual_seed(data_rank)
    expert_P = (
        torch.randint(0, X + 1, (2 * n,), generator=numbers) if experts < 0 else torch.full((2 * n,), experts)
    )
    place_P = torch.zeros_like(expert_P)
    for i in range(X):
        place_P[expert_P == i] = torch.arange(int((expert_P == i).sum()))
    token_P = torch.arange(n).repeat(2)
    found = []
    for built, call in ((ours, ours.dispatcher), (alone, None)):
        x = draw(data_rank, n, E).requires_grad_()
        weight_P = draw(10 + data_rank, 2 * n).requires_grad_()
        pairs = Pairs(token_P, expert_P, weight_P, place_P, 2 * n)
        if call:
            y = call(x, pairs, pick(built))
        else:
            y = reference(x, pairs, pick(built), "swiglu")
        (y * draw(20 + data_rank, n, E)).sum().backward()
        found.append((y, x.grad, weight_P.grad))
    torch.testing.assert_close(*found, **EXACT)
    same_gradients(here, ours, alone, EXACT)


CASES = [
    (2, {"expert": 2}, [7, 5], -1),
    (2, {"expert": 2}, [7, 0], -1),
    (2, {"expert": 2}, [6, 4], 3),  # the first rank's experts have nothing to do
    (2, {"expert": 2}, [6, 4], X),  # nothing is computed
    (4, {"expert": 4}, [1, 0, 9, 2], 1),
    (2, {"expert": 2, "shard": 1, "tensor": 2}, [7], -1),
    (2, {"expert": 2, "shard": 1, "tensor": 2}, [1], -1),
    (4, {"expert": 2, "shard": 1, "tensor": 4}, [6], -1),  # the last rank has no share
    (4, {"expert": 4, "shard": 2, "tensor": 2}, [5, 0], -1),
    (4, {"expert": 2, "shard": 1, "context": 2, "tensor": 2}, [5, 3], -1),
]


@pytest.mark.parametrize("kernel", ["reference", "grouped", "batched"])
@pytest.mark.parametrize(("ranks", "parallel", "tokens", "experts"), CASES)
def test_any_pairs(pool, ranks, parallel, tokens, experts, kernel):
    pool(hand_made, ranks=ranks, parallel=parallel, tokens=tokens, experts=experts, kernel=kernel)


def routed(rank, world, parallel, experts, precision="fp64", compiled=False):
    """A layer forward and backward on each rank's rows; [outputs, gradients] spread and alone."""
    torch.compiler.reset()
    here = start(rank, world, parallel)
    dtype = torch.float64 if precision == "fp64" else torch.float32
    ours, alone = layer(here, dtype, **experts), layer(None, dtype, **experts)
    data_rank = rank // here.layout.tensor
    found = []
    for built in (ours, alone):
        call = torch.compile(built) if compiled and built is ours else built
        x = draw(data_rank, 2, S, E, dtype=dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
            y, side = call(x, None)
        loss = (y * draw(20 + data_rank, 2, S, E, dtype=dtype)).sum() + side["balance"].sum()
        loss.backward()
        found.append((y, side, x.grad, built.router.weight.grad))
    if precision == "bf16" and (compiled or experts["kernel"] == "reference"):
        # Compiled code rounds less often than eager; the reference adds up in bf16, the exchange in fp32.
        for a, b in zip(*found, strict=True):
            if isinstance(a, torch.Tensor):
                assert (a - b).norm() < 0.02 * b.norm()
    elif precision == "bf16":  # the very same products and additions, but for the gradients of experts
        torch.testing.assert_close(*found, rtol=0, atol=0)
        same_gradients(here, ours, alone, {"rtol": 1e-2, "atol": 0.2})
    else:
        exact = EXACT if precision == "fp64" else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(*found, **exact)
        same_gradients(here, ours, alone, exact)


@pytest.mark.parametrize(
    "experts", [{"top_k": 2}, {"top_k": 1, "normalise": False, "capacity": 0.7}, {"routing": "experts", "shared": 1}]
)  # fmt: skip
@pytest.mark.parametrize(
    ("ranks", "parallel"), [(2, {"expert": 2}), (2, {"expert": 2, "shard": 1, "tensor": 2})]
)
def test_layers(pool, ranks, parallel, experts):
    pool(routed, ranks=ranks, parallel=parallel, experts=experts)


@pytest.mark.parametrize("kernel", ["reference", "grouped", "batched"])
def test_autocast(pool, kernel):
    settings = {"kernel": kernel, "capacity": 1.0}
    pool(routed, ranks=2, parallel={"expert": 2}, experts=settings, precision="bf16")


@pytest.mark.matrix
def test_compiled(pool):
    """The exchange breaks the graph, and nothing else changes."""
    for precision in ("fp32", "bf16"):
        settings = {"experts": {"shared": 1}, "precision": precision, "compiled": True}
        pool(routed, ranks=2, timeout=400, parallel={"expert": 2}, **settings)
