"""Positions against transformers (Marian, ViT-MAE, T5) and timm."""

import pytest
import torch

from headway.pretrain.errors import JobError
from headway.pretrain.models.positions import (
    LearnedPositions,
    RelativeBias,
    SinusoidalGrid,
    SinusoidalPositions,
)

from ...oracles import timm


@pytest.mark.parametrize("hidden", [16, 30, 7])
def test_sinusoids_are_marians_in_the_papers_order(hidden):
    from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

    theirs = MarianSinusoidalPositionalEmbedding(50, hidden).create_weight()  # fp64 inside, fp32 kept
    ours = SinusoidalPositions(hidden)(torch.arange(50), torch.float32)
    sines = (hidden + 1) // 2
    torch.testing.assert_close(ours[:, 0::2], theirs[:, :sines], rtol=0, atol=1e-7)
    torch.testing.assert_close(ours[:, 1::2], theirs[:, sines:], rtol=0, atol=1e-7)


def test_sinusoids_of_positions_by_row():
    positions = torch.tensor([[0, 1, 2], [5, 0, 70000]])
    table = SinusoidalPositions(12)
    rows = table(positions, torch.float64)
    assert rows.shape == (2, 3, 12)
    assert torch.equal(rows[1], table(positions[1], torch.float64))
    assert table(positions, torch.bfloat16).dtype == torch.bfloat16
    # Section 3.5: PE(pos, 2i) = sin(pos / 10000^(2i / d)), PE(pos, 2i + 1) = cos of the same.
    angle = torch.tensor(70000 / 10000 ** (4 / 12), dtype=torch.float64)
    torch.testing.assert_close(rows[1, 2, 4:6], torch.stack((angle.sin(), angle.cos())), rtol=0, atol=1e-10)


@pytest.mark.parametrize("class_token", [False, True])
def test_grid_is_the_one_of_mae(class_token):
    from transformers import ViTMAEConfig
    from transformers.models.vit_mae.modeling_vit_mae import (
        ViTMAEEmbeddings,
        build_2d_sinusoidal_position_embedding,
    )

    # Not through a whole model: transformers 5.23 leaves its positions 0, because it takes them for initialised.
    embeddings = ViTMAEEmbeddings(ViTMAEConfig(image_size=20, patch_size=4, hidden_size=24))
    embeddings.initialize_weights()
    ours = SinusoidalGrid(24)(5, 5, torch.float32, torch.device("cpu"), int(class_token))
    theirs = embeddings.position_embeddings[0, 0 if class_token else 1 :]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)  # both fp64 inside

    two = SinusoidalGrid(24)(5, 5, torch.float32, torch.device("cpu"), 2)
    assert not two[:2].any()
    assert torch.equal(two[2:], ours[int(class_token) :])

    wide = SinusoidalGrid(24)(3, 7, torch.float32, torch.device("cpu"), int(class_token))
    theirs = build_2d_sinusoidal_position_embedding(3, 7, 24, cls_token=class_token)
    torch.testing.assert_close(
        wide.roll(12, -1), theirs, rtol=0, atol=1e-7
    )  # rows first there: halves swapped


def test_grid_is_timms_with_halves_swapped():
    timm()
    from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed

    theirs = build_sincos2d_pos_embed([3, 7], 24, interleave_sin_cos=True)
    ours = SinusoidalGrid(24)(3, 7, torch.float32, torch.device("cpu"))
    # timm's angles are fp32: 6 radians carry 2^-22 at most, and its frequencies 2^-23 relative of that.
    torch.testing.assert_close(ours.roll(12, -1), theirs, rtol=0, atol=2e-6)


def test_grid_refuses_widths_that_have_no_quarter():
    with pytest.raises(JobError, match=r"model.hidden = 30.*multiple of 4.*32"):
        SinusoidalGrid(30)


def t5(heads, buckets, distance, decoder):
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    settings = T5Config(
        d_model=8,
        d_kv=4,
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=distance,
        is_decoder=decoder,
    )
    return T5Attention(settings, has_relative_attention_bias=True, layer_idx=0)


@pytest.mark.parametrize(
    ("buckets", "distance"), [(32, 128), (32, 20), (9, 5), (31, 100), (4, 3), (64, 1000), (16, 96), (6, 128)]
)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_and_bias_are_t5s(buckets, distance, bidirectional):
    theirs = t5(5, buckets, distance, decoder=not bidirectional)
    ours = RelativeBias(5, buckets, distance)
    ours.table.load_state_dict(theirs.relative_attention_bias.state_dict())
    far = torch.arange(-3000, 3001)
    expected = theirs._relative_position_bucket(far, bidirectional, buckets, distance)
    assert torch.equal(ours.buckets(torch.tensor([0]), far, bidirectional)[0], expected)
    for queries, keys, past in ((13, 13, 0), (7, 301, 0), (301, 1, 0), (5, 64, 59)):
        bias = ours(torch.arange(queries) + past, torch.arange(keys), bidirectional)
        assert torch.equal(bias, theirs.compute_bias(queries, keys, past_seen_tokens=past)[0])


def test_bias_compiles_learns_and_builds_on_meta():
    bias = RelativeBias(3, 8, 20)
    torch.nn.init.normal_(bias.table.weight)
    places = torch.arange(17)
    whole = torch.compile(bias, fullgraph=True)(places, places, True)
    torch.testing.assert_close(whole, bias(places, places, True))
    whole[1].sum().backward()
    used = torch.bincount(bias.buckets(places, places, True).flatten(), minlength=8)
    assert torch.equal(bias.table.weight.grad, used[:, None] * torch.tensor([0.0, 1.0, 0.0]))
    with torch.device("meta"):
        assert RelativeBias(3, 8, 20)(torch.arange(4), torch.arange(9), False).shape == (3, 4, 9)


def test_bias_refuses_what_it_cannot_divide():
    with pytest.raises(JobError, match=r"model.relative_buckets = 3"):
        RelativeBias(2, 3, 128)
    with pytest.raises(JobError, match=r"model.relative_distance = 16.*17"):
        RelativeBias(2, 32, 16)


def test_learned_positions_name_the_longest():
    table = LearnedPositions(8, 4)
    assert table(torch.arange(8)).shape == (8, 4)
    with pytest.raises(JobError, match=r"data.seq_len = 9.*8 rows"):
        table(torch.arange(9))
