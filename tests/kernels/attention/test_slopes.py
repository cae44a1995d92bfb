"""ALiBi's slopes against transformers' BLOOM and MPT, and the description of its bias against the bias itself."""

import pytest
import torch

from headway.kernels.attention.slopes import Slopes, block_of, geometric, part_of

HEADS = [1, 2, 3, 6, 8, 12, 16, 20, 25, 71]


@pytest.mark.parametrize("heads", HEADS)
def test_slopes_are_blooms_and_mpts(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    bloom = build_alibi_tensor(torch.ones(1, 9, dtype=torch.int64), heads, torch.float32)[:, 0]
    mpt = build_mpt_alibi_tensor(heads, 9)[:, 0]
    slopes = torch.tensor(geometric(heads))
    ours = Slopes(slopes, torch.tensor([8]), torch.arange(9)).block()[:, 0]
    # Theirs are powers of a rounded base (up to 16 times 2^-24 off), times up to 8 places.
    torch.testing.assert_close(ours, bloom - bloom[:, -1:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours, mpt, rtol=1e-5, atol=1e-6)


def test_parts_are_parts_of_the_whole():
    places = torch.arange(9)
    bias = Slopes(torch.tensor(geometric(3)), places, places)
    whole = bias.block()
    for i, j in [(0, 8), (8, 0), (4, 4)]:
        assert whole[1, i, j] == -bias.slopes[1] * abs(i - j)  # both ways alike
    queries, keys, picked = slice(2, 5), slice(1, 9), torch.tensor([0, 7, 3])
    assert torch.equal(bias.block(queries, keys), whole[:, queries, keys])
    assert torch.equal(block_of(bias, queries, picked), block_of(whole, queries, picked))
    assert torch.equal(part_of(bias, queries, keys).block(), part_of(whole, queries, keys))
    assert torch.equal(bias.of_heads(1, 2).block(), whole[1:])
