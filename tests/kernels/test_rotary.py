"""Rotary positions against transformers' Llama."""

import torch

from headway.kernels.rotary import rotate, rotation


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
