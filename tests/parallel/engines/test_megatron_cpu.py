"""Megatron-Core on the CPU: every part that the engine uses, beside plain torch in one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from headway.tests.parallel.engines.megatron_ranks import groups

pytest.importorskip("megatron.core")

B, S, E, I, V = 2, 4, 6, 8, 12
"""Rows, sequence, hidden, inner and vocabulary sizes."""


def settings(**more):
    from megatron.core import ModelParallelConfig

    return ModelParallelConfig(gradient_accumulation_fusion=False, perform_initialization=False, **more)


def whole(dtype=torch.float64):
    """Weights of a table, a linear, one behind it, and a head; ids and labels [S, B]."""
    torch.manual_seed(0)
    sizes = {"table": (V, E), "inner": (I, E), "bias": (I,), "outer": (E, I), "gain": (E,), "head": (V, E)}
    weights = {n: torch.randn(size, dtype=dtype).requires_grad_() for n, size in sizes.items()}
    return weights, torch.randint(0, V, (S, B)), torch.randint(0, V, (S, B))


def in_one_process():
    weights, ids_SB, labels_SB = whole()
    w = weights
    x_SBE = F.embedding(ids_SB, w["table"]) * w["gain"]
    y_SBE = x_SBE + F.gelu(x_SBE @ w["inner"].T + w["bias"]) @ w["outer"].T
    loss = F.cross_entropy((y_SBE @ w["head"].T).flatten(0, 1), labels_SB.flatten(), reduction="sum")
    loss.backward()
    return loss.item(), {n: v.grad for n, v in weights.items()}


def layers(rank, world, sequence):
    """The same over tensor 2 by Megatron's layers: loss, and this rank's part of each gradient with its place."""
    with groups(tensor_model_parallel_size=world):
        from megatron.core import tensor_parallel as tp

        config = settings(tensor_model_parallel_size=world, sequence_parallel=sequence, params_dtype=torch.float64)
        ours = {"config": config, "init_method": nn.init.zeros_}
        table = tp.VocabParallelEmbedding(V, E, reduce_scatter_embeddings=sequence, **ours)
        inner = tp.ColumnParallelLinear(E, I, gather_output=False, **ours)
        outer = tp.RowParallelLinear(
            I, E, bias=False, input_is_parallel=True, skip_bias_add=False, **ours
        )
        head = tp.ColumnParallelLinear(E, V, bias=False, gather_output=False, **ours)
        weights, ids_SB, labels_SB = whole()
        modules = {"table": table, "inner": inner, "outer": outer, "head": head}
        parts = {n: m.weight for n, m in modules.items()} | {"bias": inner.bias}
        for name, part in parts.items():
            part.data.copy_(weights[name].chunk(world, int(name == "outer"))[rank].detach())
        x = table(ids_SB.T)  # [B, S, E], or [S, B, E]'s part of the sequence
        x = (x if sequence else x.transpose(0, 1)) * weights["gain"]
        y = x + outer(F.gelu(inner(x)[0]))[0]
        logits = head(y)[0]
        loss = tp.vocab_parallel_cross_entropy(logits, labels_SB.clone()).sum()
        loss.backward()
        gain = weights["gain"].grad
        if sequence:
            dist.all_reduce(gain)
        return loss.item(), {n: p.grad.numpy() for n, p in parts.items()} | {"gain": gain.numpy()}


@pytest.mark.parametrize("sequence", [False, True])
def test_layers(pool, sequence):
    """Tables, linears and the loss over cut vocabularies; with sequence parallelism, too. In fp64 but for the loss, which Megatron takes of fp32 logits."""
    loss, gradients = in_one_process()
    for rank, (found, parts) in enumerate(pool(layers, ranks=2, sequence=sequence)):
        assert found == pytest.approx(loss, rel=1e-6)
        for name, part in parts.items():
            expected = gradients[name]
            if name != "gain":
                expected = expected.chunk(2, int(name == "outer"))[rank]
            torch.testing.assert_close(torch.from_numpy(part), expected, rtol=1e-5, atol=1e-6, msg=name)


# -- gradients and optimizers ----------------------------------------------------------------------------------

STEPS, LR, DECAY, CLIP = 3, 1e-2, 0.1, 0.5


def net(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(E, I), nn.GELU(), nn.LayerNorm(I), nn.Linear(I, E)).to(dtype)


def rows(step, rank, micro, dtype):
    """Input and target [B, E] of a micro-batch."""
    return torch.randn(2, B, E, generator=torch.Generator().manual_seed(100 * step + 10 * rank + micro)).to(dtype)


def loss_of(module, micro):
    return (module(micro[0]) - micro[1]).float().square().sum()


def by_torch(dtype):
    """AdamW on fp32 weights, whose copies in `dtype` give gradients that are added up in fp32; weights and norms."""
    module = net(dtype)
    masters = [p.detach().float().requires_grad_() for p in module.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=LR, weight_decay=DECAY)
    norms = []
    for step in range(STEPS):
        for master in masters:
            master.grad = torch.zeros_like(master)
        for rank in range(2):
            for micro in range(2):
                loss_of(module, rows(step, rank, micro, dtype)).backward()
                for parameter, master in zip(module.parameters(), masters, strict=True):
                    master.grad += parameter.grad.float()
                    parameter.grad = None
        norms.append(float(nn.utils.clip_grad_norm_(masters, CLIP)))
        optimizer.step()
        for parameter, master in zip(module.parameters(), masters, strict=True):
            parameter.data.copy_(master)
    return norms, [p.detach().float().numpy() for p in module.parameters()]


def by_megatron(rank, world, dtype, distributed, overlap):
    """The same over data 2: a rank's micro-batches are its own, gradients are summed."""
    with groups():
        from megatron.core import optimizer as optimizers
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.transformer import TransformerConfig

        dtype = getattr(torch, dtype)
        config = TransformerConfig(
            num_layers=1, hidden_size=E, num_attention_heads=1, calculate_per_token_loss=True
        )
        spread = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap and distributed,
            use_distributed_optimizer=distributed,
            bucket_size=50,
        )
        module = DistributedDataParallel(config, spread, net(dtype))
        settings = optimizers.OptimizerConfig(
            lr=LR,
            weight_decay=DECAY,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=distributed,
            overlap_param_gather=overlap and distributed,
            clip_grad=CLIP,
        )
        optimizer = optimizers.get_megatron_optimizer(settings, [module], config_overrides={})
        norms = []
        for step in range(STEPS):
            module.zero_grad_buffer()
            optimizer.zero_grad()
            with module.no_sync():
                loss_of(module, rows(step, rank, 0, dtype)).backward()
            loss_of(module, rows(step, rank, 1, dtype)).backward()
            finalize_model_grads([module], None)
            norms.append(optimizer.step()[1])
        if overlap and distributed:
            module.start_param_sync(force_sync=True)
        return norms, [p.detach().float().numpy() for p in module.module.parameters()], len(module.buffers[0].buckets)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_data_parallel_and_optimizers(pool, dtype, distributed, overlap):
    """Copies and shards of the optimizer's state, with and without collectives under way while it computes.

    In bf16 weights are rounded alike unless their masters lie within fp32's error of the middle between two.
    """
    norms, weights = by_torch(getattr(torch, dtype))
    for found, ours, buckets in pool(by_megatron, ranks=2, dtype=dtype, distributed=distributed, overlap=overlap):
        assert found == pytest.approx(norms, rel=1e-5)
        assert (buckets > 1) == overlap
        for expected, part in zip(weights, ours, strict=True):
            tolerance = 2e-6 if dtype == "float32" else 1e-2
            torch.testing.assert_close(*map(torch.from_numpy, (part, expected)), rtol=tolerance, atol=tolerance)


# -- experts ---------------------------------------------------------------------------------------------------

X, K, N = 4, 2, 7
"""Experts, experts of a token, tokens of a rank."""


def routed(rank, dropped):
    """Tokens [N, E], which experts they go to [N, X] and with what weight; some pairs may be dropped."""
    draw = torch.Generator().manual_seed(rank)
    x_NE = torch.randn(N, E, generator=draw, dtype=torch.float64).requires_grad_()
    weight_NX = torch.rand(N, X, generator=draw, dtype=torch.float64)
    map_NX = torch.zeros(N, X, dtype=torch.bool).scatter_(1, weight_NX.topk(K)[1], True)
    if dropped:
        map_NX &= torch.rand(N, X, generator=draw) > 0.3
    return x_NE, map_NX, (weight_NX * map_NX).requires_grad_()


def gain_XE():
    return torch.linspace(-1, 1, X * E, dtype=torch.float64).reshape(X, E)


def dispatch(rank, world, dropped):
    with groups(expert_model_parallel_size=world, expert_tensor_parallel_size=1):
        from megatron.core.transformer import TransformerConfig
        from megatron.core.transformer.moe.moe_utils import (
            get_default_pg_collection,
            router_gating_linear,
        )
        from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

        config = TransformerConfig(
            num_layers=1, hidden_size=E, num_attention_heads=1, num_moe_experts=X, moe_router_topk=K,
            expert_model_parallel_size=world, moe_token_dispatcher_type="alltoall",
            moe_expert_capacity_factor=1.0 if dropped else None, add_bias_linear=False,
        )  # fmt: skip
        local = X // world
        mine = list(range(rank * local, (rank + 1) * local))
        way = MoEAlltoAllTokenDispatcher(local, mine, config, get_default_pg_collection())
        x_NE, map_NX, weight_NX = routed(rank, dropped)
        rows, weights = way.token_dispatch(*way.dispatch_preprocess(x_NE, map_NX, weight_NX))
        rows, counts, weights = way.dispatch_postprocess(rows, weights)
        gains = gain_XE()[mine].repeat_interleave(counts, 0)
        made = way.combine_preprocess(rows * gains * weights[:, None])
        y_NE = way.combine_postprocess(way.token_combine(made))
        y_NE.square().sum().backward()
        scores = router_gating_linear(x_NE.detach(), gain_XE(), None, torch.float32)
        return y_NE.detach().numpy(), x_NE.grad.numpy(), weight_NX.grad.numpy(), scores.numpy()


@pytest.mark.parametrize("dropped", [False, True])
def test_dispatch_of_tokens(pool, dropped):
    """All-to-all to experts on two ranks and back; and the router's product, which upstream raises NameError."""
    for rank, found in enumerate(pool(dispatch, ranks=2, dropped=dropped)):
        x_NE, _, weight_NX = routed(rank, dropped)
        y_NE = torch.einsum("ne,xe,nx->ne", x_NE, gain_XE(), weight_NX)
        y_NE.square().sum().backward()
        score_NX = (x_NE.detach() @ gain_XE().T).float()
        weights = torch.where(weight_NX > 0, weight_NX.grad, 0)
        for part, expected in zip(found, (y_NE.detach(), x_NE.grad, weights, score_NX), strict=True):
            tolerance = 1e-12 if part.dtype == "float64" else 1e-6  # the router's product is one of fp32
            torch.testing.assert_close(torch.from_numpy(part), expected, rtol=tolerance, atol=tolerance)
