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
