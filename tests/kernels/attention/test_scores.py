"""Scores against others' implementations, with the same weights and inputs, forward and backward, in fp64."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2

from headway.kernels.attention.masks import Mask
from headway.kernels.attention.registry import mechanism
from headway.tests import oracles

FULL = Mask(False)
B, H, S, D = 2, 4, 13, 8


def heads(keys=H, length=S, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, S, D), (B, keys, length, D), (B, keys, length, D)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def close(ours, theirs, inputs, rounding=1e-11):
    """Values and gradients agree to roundings of fp64 in sums of some hundred terms."""
    torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding)
    up = torch.randn(ours.shape, generator=torch.Generator().manual_seed(9), dtype=ours.dtype)
    found = [torch.autograd.grad(y, inputs, up, retain_graph=True) for y in (ours, theirs)]
    torch.testing.assert_close(*found, rtol=10 * rounding, atol=10 * rounding)


def compute(name, *args, kernel="reference", **extras):
    return mechanism(name).kernels[kernel].compute(*args, **extras)


def test_additive_is_joeynmts():
    q, k, v = heads()
    direction = torch.randn(H, D, dtype=torch.float64, requires_grad=True)
    theirs = torch.empty(B, H, S, D, dtype=torch.float64)
    rows, joeynmt = [], oracles.file("joeynmt/attention.py")
    for h in range(H):
        module = joeynmt.BahdanauAttention(D, D, D).double()
        module.query_layer.weight = module.key_layer.weight = torch.nn.Parameter(torch.eye(D).double())
        del module.energy_layer
        module.energy_layer = lambda x, h=h: x @ direction[h][:, None]
        module.compute_proj_keys(k[:, h])
        rows.append([module(q[:, h, i : i + 1], torch.ones(B, 1, S), v[:, h])[0] for i in range(S)])
    theirs = torch.stack([torch.cat(r, 1) for r in rows], 1)
    close(compute("additive", q, k, v, FULL, direction=direction), theirs, (q, k, v, direction))


def test_general_is_joeynmts():
    q, k, v = heads()
    score = torch.randn(H, D, D, dtype=torch.float64, requires_grad=True)
    rows, joeynmt = [], oracles.file("joeynmt/attention.py")
    for h in range(H):
        module = joeynmt.LuongAttention(D, D).double()
        del module.key_layer.weight
        module.key_layer.weight = score[h]
        module.compute_proj_keys(k[:, h])
        rows.append(
            torch.cat([module(q[:, h, i : i + 1], torch.ones(B, 1, S), v[:, h])[0] for i in range(S)], 1)
        )
    close(compute("general", q, k, v, FULL, score=score), torch.stack(rows, 1), (q, k, v, score))


def test_dot_and_temperature_are_scaled_products():
    q, k, v = heads(keys=2)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=True)
    close(compute("dot", q, k, v, Mask()), theirs, (q, k, v))
    t = torch.randn(H, dtype=torch.float64, requires_grad=True)
    theirs = F.scaled_dot_product_attention(q * t.exp()[:, None, None], k, v, is_causal=True, enable_gqa=True)
    close(compute("temperature", q, k, v, Mask(), log_temperature=t), theirs, (q, k, v, t))


def test_cosine_is_torchs():
    q, k, v = heads()
    t = torch.linspace(0.1, 1.5, H, dtype=torch.float64).requires_grad_()
    scores = F.cosine_similarity(q.unsqueeze(-2), k.unsqueeze(-3), -1, eps=1e-12) * t.exp()[:, None, None]
    close(compute("cosine", q, k, v, FULL, log_temperature=t), scores.softmax(-1) @ v, (q, k, v, t))


@pytest.mark.parametrize("kernel", ["reference", "blocks"])
def test_softcap_is_gemmas(kernel):
    q, k, v = heads(keys=2)
    hidden = torch.full((S, S), -torch.inf, dtype=torch.float64).triu(1)
    module = SimpleNamespace(num_key_value_groups=2, training=False, head_dim=D)
    module.training = False
    scores = (q @ k.repeat_interleave(2, 1).mT * D**-0.5 / 2.0).tanh() * 2.0 + hidden
    theirs = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    close(compute("softcap", q, k, v, Mask(), softcap=2.0, kernel=kernel), theirs, (q, k, v))
    # Theirs rounds weights to fp32 on the way: 2^-24 of weights below 1.
    gemma = gemma2(module, q, k, v, hidden, softcap=2.0)[0].transpose(1, 2)
    torch.testing.assert_close(gemma, theirs, rtol=1e-6, atol=1e-6)


def test_talking_heads_are_timms():
    oracles.timm()
    from timm.models.cait import TalkingHeadAttn

    module = TalkingHeadAttn(H * D, H).double()
    for mix in (module.proj_l, module.proj_w):
        mix.bias.data.zero_()  # the paper has none
    x = torch.randn(B, S, H * D, dtype=torch.float64, requires_grad=True)
    q, k, v = module.qkv(x).view(B, S, 3, H, D).permute(2, 0, 3, 1, 4)
    mixes = {"before": module.proj_l.weight, "after": module.proj_w.weight}
    ours = compute("talking", q, k, v, FULL, **mixes)
    close(module.proj(ours.transpose(1, 2).flatten(2)), module(x), (x, *mixes.values()))


def test_differential_is_timms():
    oracles.timm()
    from timm.layers.diff_attention import DiffAttention

    module = DiffAttention(H * D, H, depth=3).double()
    names = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
    for name in names:
        torch.nn.init.normal_(getattr(module, name), std=0.5)
    x = torch.randn(B, S, H * D, dtype=torch.float64, requires_grad=True)
    q, k, v = module.qkv(x).view(B, S, 3, H, D).permute(2, 0, 3, 1, 4)
    shared = {name: getattr(module, name).expand(H, -1) for name in names}
    first = mechanism("differential").settings["first_lambda"](3)
    assert first == pytest.approx(module.lambda_init, abs=1e-12)
    for kernel in mechanism("differential").kernels_on("cpu"):
        ours = compute("differential", q, k, v, FULL, first_lambda=first, kernel=kernel, **shared)
        own = [getattr(module, name) for name in names]
        # Theirs computes lambda in fp32: roundings of 2^-24 of exponentials, divided by small norms.
        close(module.proj(ours.transpose(1, 2).flatten(2)), module(x), (x, *own), 1e-5)
