"""Rotary positions against transformers' Llama."""

import pytest
import torch

from headway.kernels.rotary import Stretch, frequencies, magnitude, rotate, rotation


def test_rotation_is_llamas():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = torch.randn(2, 6, 17, 10, dtype=torch.float64), torch.randn(2, 3, 17, 10, dtype=torch.float64)
    angles = torch.arange(17).double()[:, None] * 500.0 ** -(torch.arange(0, 10, 2).double() / 10)
    both = torch.cat((angles, angles), -1)[None]
    theirs = apply_rotary_pos_emb(q, k, both.cos(), both.sin())
    turn = rotation(torch.arange(17), 10, 500.0, torch.float64)
    torch.testing.assert_close((rotate(q, turn), rotate(k, turn)), theirs, rtol=1e-12, atol=1e-12)


def test_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    scores = []
    for shift in (0, 1000):
        turns = (rotation(torch.tensor([p + shift]), 8, 1e4, torch.float64) for p in (5, 2))
        turned = [rotate(x, t) for x, t in zip((q, k), turns, strict=True)]
        scores.append((turned[0] * turned[1]).sum())
    torch.testing.assert_close(*scores, rtol=1e-10, atol=1e-10)


def test_positions_of_each_row():
    x = torch.randn(2, 3, 4, 6)
    rows = torch.tensor([[0, 1, 2, 3], [7, 8, 9, 10]])
    whole = rotate(x, rotation(rows, 6, 1e4))
    for i in range(2):
        assert torch.equal(whole[i : i + 1], rotate(x[i : i + 1], rotation(rows[i], 6, 1e4)))


def theirs(dim, base, length, seq_len=None, **rope):
    """transformers' inverse frequencies and attention factor."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=dim, num_attention_heads=1, head_dim=dim, max_position_embeddings=length,
        rope_parameters={"rope_theta": base, **rope},
    )  # fmt: skip
    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu", seq_len=seq_len)


YARN = {"rope_type": "yarn", "original_max_position_embeddings": 2048}
LLAMA3 = {"rope_type": "llama3", "original_max_position_embeddings": 8192}
STRETCHES = {
    "linear": (Stretch("linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
    # Their base grows with the length; at 5 times the length, with factor 1, it is that of factor 5.
    "ntk": (Stretch("ntk", 5.0), {"rope_type": "dynamic", "factor": 1.0, "seq_len": 5 * 4096}),
    "yarn": (Stretch("yarn", 16.0, 2048), {**YARN, "factor": 16.0}),
    "yarn between features": (
        Stretch("yarn", 16.0, 2048, 1.5, 24.0, False),
        {**YARN, "factor": 16.0, "beta_slow": 1.5, "beta_fast": 24.0, "truncate": False},
    ),
    "yarn of a given magnitude": (
        Stretch("yarn", 4.0, 2048, magnitude=1.25), {**YARN, "factor": 4.0, "attention_factor": 1.25}
    ),
    "yarn without stretching": (Stretch("yarn", 1.0, 2048), {**YARN, "factor": 1.0}),
    "llama3": (
        Stretch("llama3", 8.0, 8192, 1.0, 4.0),
        {**LLAMA3, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
    "llama3 with a wide ramp": (
        Stretch("llama3", 32.0, 8192, 0.5, 16.0),
        {**LLAMA3, "factor": 32.0, "low_freq_factor": 0.5, "high_freq_factor": 16.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("dim", "base"), [(128, 10000.0), (64, 500000.0), (6, 100.0)])
@pytest.mark.parametrize("name", STRETCHES)
def test_frequencies_are_transformers(name, dim, base):
    stretch, rope = STRETCHES[name]
    expected, size = theirs(dim, base, 4096, **rope)
    found = frequencies(dim, base, stretch)
    # fp32 on their side: some ten roundings of 2^-24, in exponents of up to ln(500000) = 13.
    torch.testing.assert_close(found.float(), expected, rtol=3e-6, atol=0)
    assert magnitude(stretch) == pytest.approx(size, rel=1e-12)


def test_plain_frequencies_are_kept_where_nothing_is_stretched():
    plain = frequencies(64, 1e4)
    for kind in ("linear", "ntk", "yarn", "llama3"):
        torch.testing.assert_close(frequencies(64, 1e4, Stretch(kind, 1.0, 2048)), plain, rtol=1e-15, atol=0)


def test_a_magnitude_multiplies_scores_by_its_square():
    q, k = torch.randn(2, 1, 1, 9, 8, dtype=torch.float64)
    scores = []
    for size in (1.0, 1.3):
        turn = rotation(torch.arange(9), 8, 1e4, torch.float64, Stretch("yarn", 4.0, 512, magnitude=size))
        scores.append(rotate(q, turn) @ rotate(k, turn).mT)
    torch.testing.assert_close(scores[1], scores[0] * 1.3**2, rtol=1e-12, atol=1e-12)
