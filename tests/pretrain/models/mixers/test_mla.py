"""Latent attention against DeepSeek-V3's of transformers with the same weights, and its forms against each other."""

import pytest
import torch

from headway.kernels.attention import choose as choices
from headway.kernels.attention.choose import choose
from headway.kernels.attention.masks import Mask, lower
from headway.kernels.rotary import rotation
from headway.pretrain import config
from headway.pretrain.errors import JobError
from headway.pretrain.models.attention import Beside
from headway.pretrain.models.gpt import GPT
from headway.pretrain.models.init import initialise
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.layers import Noise
from headway.pretrain.models.maps import attention_maps
from headway.pretrain.models.mixers import build_mixer
from headway.pretrain.models.seat import Seat

HIDDEN, HEADS, DIM, ROTARY, RANK, LENGTH = 24, 3, 8, 4, 10, 19
DOCUMENTS = torch.tensor([[0] * 6 + [1] * 8 + [-1] * 5, [3] * LENGTH])
MASKS = {
    "causal": Mask(),
    "full": Mask(False),
    "documents": Mask(True, DOCUMENTS),
    "padded": Mask(False, DOCUMENTS),
}
TURN = rotation(torch.arange(LENGTH), DIM, 10000.0, torch.float64)


def model_of(query_rank=0, bias=False, **attention):
    sizes = {"rank": RANK, "query_rank": query_rank, "rotary_dim": ROTARY}
    return config.Model(
        hidden=HIDDEN,
        heads=HEADS,
        head_dim=DIM,
        bias=bias,
        positions="rotary",
        norm_eps=1e-6,
        attention=config.Attention(mechanism="mla", **sizes | attention),
    )


def layer_of(model):
    layer = build_mixer(model, Seat(0, True, tokens=LENGTH)).double()
    initialise(layer, model.model_copy(update={"init": config.Init(scheme="normal", std=0.3)}), seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # norms and biases begin at 1 and 0, which would hide a swap
        for p in layer.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.1)
    return layer


def deepseek(query_rank, bias, interleaved):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

    shape = DeepseekV3Config(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=query_rank or None,
        kv_lora_rank=RANK,
        qk_rope_head_dim=ROTARY,
        qk_nope_head_dim=DIM,
        v_head_dim=DIM,
        attention_bias=bias,
        rope_interleave=interleaved,
        attn_implementation="sdpa",
    )
    layer = theirs.DeepseekV3Attention(shape, 0)
    for name, width in (("q_a_layernorm", query_rank), ("kv_a_layernorm", RANK)):
        if width:  # theirs compute in fp32 whatever they are given; so does eager attention
            setattr(layer, name, torch.nn.RMSNorm(width, 1e-6))
    return layer.double(), theirs.DeepseekV3RotaryEmbedding(shape)


def to_deepseek(ours, interleaved):
    """Our tensors (weights or gradients) by their names: joined as theirs are, pairs of features in their order."""
    order = torch.arange(ROTARY).view(2, -1).T.flatten() if interleaved else torch.arange(ROTARY)
    rows = torch.cat((torch.arange(DIM), DIM + order))
    q = ours["q.weight"].unflatten(0, (HEADS, -1))[:, rows].flatten(0, 1)
    kv = torch.cat([ours[f"{x}.weight"].unflatten(0, (HEADS, DIM)) for x in "kv"], 1).flatten(0, 1)
    found = {
        "kv_a_layernorm.weight": ours["kv_norm.weight"],
        "kv_b_proj.weight": kv,
        "o_proj.weight": ours["o.weight"],
    }
    found["q_b_proj.weight" if "q_down.weight" in ours else "q_proj.weight"] = q
    for kind in ("weight", "bias"):
        if f"kv_down.{kind}" in ours:
            both = ours[f"kv_down.{kind}"], ours[f"shared_k.{kind}"][order]
            found[f"kv_a_proj_with_mqa.{kind}"] = torch.cat(both)
        if f"q_down.{kind}" in ours:
            found[f"q_a_proj.{kind}"] = ours[f"q_down.{kind}"]
    if "q_down.weight" in ours:
        found["q_a_layernorm.weight"] = ours["q_norm.weight"]
    if "o.bias" in ours:
        found["o_proj.bias"] = ours["o.bias"]
    return found


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("query_rank", "bias", "interleaved"), [(0, False, False), (7, True, False), (7, False, True)]
)
@pytest.mark.parametrize("kernel", ["auto", "absorbed"])
def test_it_is_deepseeks(kernel, query_rank, bias, interleaved, mask):
    ours = layer_of(model_of(query_rank, bias, kernel=kernel))
    theirs, rotary = deepseek(query_rank, bias, interleaved)
    theirs.load_state_dict(to_deepseek(ours.state_dict(), interleaved))
    x, upstream = torch.randn(
        2, 2, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    mine, their_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    seen = lower(MASKS[mask], LENGTH, LENGTH, x.device)
    seen = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool) if seen is None else seen
    # Their own angles are off by 2^-24 of up to 19 radians: ours are given to them, and compared with theirs apart.
    cos, sin = (
        torch.cat((t, t), -1)[None] for t in rotation(torch.arange(LENGTH), ROTARY, 10000.0, torch.float64)
    )
    for table, own in zip(rotary(x, torch.arange(LENGTH)[None]), (cos, sin), strict=True):
        torch.testing.assert_close(table, own, rtol=0, atol=2e-6)
    y, beside = ours(mine, MASKS[mask], TURN)
    expected = theirs(their_x, (cos, sin), seen)[0]
    assert beside == Beside()
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)  # fp64, chains of sums of up to 24 terms
    (y * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(mine.grad, their_x.grad, rtol=1e-10, atol=1e-10)
    slopes = to_deepseek({n: p.grad for n, p in ours.named_parameters()}, interleaved)
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(
            slopes[name], p.grad, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kernel", ["sdpa", "blocks", "absorbed"])
def test_dropout_bias_and_entropy_are_the_references(kernel):
    noise = None if kernel == "sdpa" else Noise.at(1, 2, torch.tensor([5, 9]))
    bias = torch.randn(HEADS, LENGTH, LENGTH, dtype=torch.float64)
    x = torch.randn(2, LENGTH, HIDDEN, dtype=torch.float64)
    found = []
    for request in (kernel, "reference"):
        dropout = 0.0 if noise is None else 0.3
        layer = layer_of(model_of(6, kernel=request, dropout=dropout, entropy_penalty=0.1))
        y, beside = layer(x, MASKS["documents"], TURN, noise, bias)
        found.append((y, beside.entropy_B))
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kernel", ["auto", "absorbed"])
def test_the_first_places_alone(kernel):
    layer, x = layer_of(model_of(kernel=kernel)), torch.randn(2, LENGTH, HIDDEN, dtype=torch.float64)
    bias = torch.randn(HEADS, LENGTH, LENGTH, dtype=torch.float64)
    whole, _ = layer(x, Mask(False), TURN, None, bias)
    first, _ = layer(x, Mask(False), TURN, None, bias, queries=5)
    torch.testing.assert_close(first, whole[:, :5])


def test_widths_are_the_papers_if_not_given():
    model = model_of(rank=None, rotary_dim=None, query_rank=None)
    layer = build_mixer(model, Seat())
    assert layer.kv_down.weight.shape == (4 * DIM, HIDDEN)
    assert layer.shared_k.weight.shape == (DIM // 2, HIDDEN)
    assert layer.q.weight.shape == (HEADS * (DIM + DIM // 2), HIDDEN)


def test_no_shared_features_are_plain_heads_of_a_latent():
    layer, x = layer_of(model_of(rotary_dim=0)), torch.randn(2, LENGTH, HIDDEN, dtype=torch.float64)
    y, _ = layer(x, Mask(), TURN)
    torch.testing.assert_close(y, layer(x, Mask())[0])
    c = layer.kv_norm(layer.kv_down(x))
    q, k, v = (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in (layer.q(x), layer.k(c), layer.v(c)))
    heads = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(y, layer.o(heads.transpose(1, 2).flatten(2)))


def test_the_scale_is_of_all_features_unless_given():
    x = torch.randn(2, LENGTH, HIDDEN, dtype=torch.float64)
    plain, same, other = (layer_of(model_of(scale=s))(x, Mask(), TURN)[0] for s in (None, 12**-0.5, 1.0))
    torch.testing.assert_close(plain, same)
    assert not torch.allclose(plain, other)


def test_spectral_layers_are_absorbed_too():
    found = []
    for kernel in ("reference", "absorbed"):
        layer = layer_of(model_of(kernel=kernel).model_copy(update={"spectral": True}))
        found.append(layer(torch.ones(1, LENGTH, HIDDEN, dtype=torch.float64).cumsum(1) / 9, Mask(), TURN)[0])
    torch.testing.assert_close(*found)


def test_a_rotary_width_that_cannot_be():
    for width in (3, 10):
        with pytest.raises(JobError, match=r"rotary_dim = .*even, and at most the head dimension 8"):
            build_mixer(model_of(rotary_dim=width), Seat())
    with pytest.raises(JobError, match="qk_norm"):
        build_mixer(model_of(qk_norm=True), Seat())


def test_row_blocks_are_chosen_where_torch_has_no_kernel(monkeypatch):
    monkeypatch.setattr(choices.cpp, "unavailable", lambda dtype=None: "no compiler")
    assert choose("mla").name == "blocks"
    assert choose("mla", device="cuda").name == "sdpa"
    assert choose("mla", "absorbed").name == "absorbed"
    assert choose("dense").name == "sdpa"


@pytest.mark.parametrize("kernel", ["auto", "absorbed"])
def test_maps_are_rows_of_weights(kernel):
    model = model_of(kernel=kernel).model_copy(update={"layers": 2})
    gpt = GPT(model, Inputs(31, LENGTH))
    initialise(gpt, model, seed=0)
    maps = attention_maps(gpt, torch.arange(2 * LENGTH).view(2, -1) % 31)
    assert maps.shape == (2, 2, HEADS, LENGTH, LENGTH)
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
    assert (maps.triu(1) == 0).all()
