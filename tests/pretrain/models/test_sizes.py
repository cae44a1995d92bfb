"""Sizes from the config against built models and counted operations."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from headway.pretrain import config
from headway.pretrain.models import sizes
from headway.pretrain.objectives import build_objective

MODELS = {
    "gpt2": config.Model(),
    "llama": config.Model(
        layers=3, hidden=96, heads=6, kv_heads=2, activation="swiglu", norm="rmsnorm", positions="rotary",
        tied=False, bias=False, attention=config.Attention(qk_norm=True),
    ),
    "mqa": config.Model(layers=1, hidden=60, heads=5, kv_heads=1, head_dim=14, ffn=77, activation="geglu"),
    "post": config.Model(layers=2, hidden=32, heads=4, norm_position="post", positions="none", bias=False),
    "table": config.Model(layers=2, hidden=32, heads=4, max_positions=300, norm="rmsnorm", activation="relu2"),
}  # fmt: skip


def job(model):
    return config.Job(model=model, data=config.Data(seq_len=24))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_parameters_are_the_built_models(model):
    built = build_objective(job(model), 211, device="meta")
    assert sizes.parameters(model, 211, 24).total == sum(p.numel() for p in built.parameters())


def test_gpt2_small_is_124m():
    assert sizes.parameters(MODELS["gpt2"], 50257, 1024).total == 124_439_808  # transformers' GPT-2


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_flops_are_those_of_the_products(model):
    reference = model.model_copy(
        update={"attention": model.attention.model_copy(update={"kernel": "reference"})}
    )
    built = build_objective(job(reference), 211, device="meta")
    with FlopCounterMode(display=False) as counter:
        built.logits(torch.zeros(1, 24, dtype=torch.int64, device="meta"))
    # The reference computes the whole square of scores; the config counts what causal attention needs.
    square = 4 * model.heads * model.head_width * (24 * 24 - 24 * 25 // 2) * model.layers
    assert sizes.forward_flops(model, 211, 24) * 24 == counter.get_total_flops() - square
    assert sizes.training_flops(model, 211, 24) == 3 * sizes.forward_flops(model, 211, 24)
    assert sizes.backward_flops(model, 211, 24) == 2 * sizes.forward_flops(model, 211, 24)


def test_bytes():
    model, count = MODELS["gpt2"], 124_439_808
    assert sizes.weight_bytes(model, 50257, 1024, 2) == 2 * count
    assert sizes.training_bytes(model, 50257, 1024) == 16 * count
