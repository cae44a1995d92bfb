"""Scopes against loops over places, and against others' layers."""

import pytest
import torch
from transformers import LongformerConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from headway.kernels.attention.masks import Mask
from headway.kernels.attention.parts import parts
from headway.kernels.attention.registry import mechanism
from headway.kernels.attention.scopes import BigBird, Comb, Dilated, Fixed, Global, Local, Strided, Window

EQUATIONS = {
    "window": (Window(7), lambda i, j, n: abs(i - j) < 7),
    "dilated": (Dilated(4, 3), lambda i, j, n: abs(i - j) < 12 and (i - j) % 3 == 0),
    "own block": (Local(8, 0), lambda i, j, n: i // 8 == j // 8),
    "blocks beside": (Local(8, 1), lambda i, j, n: abs(i // 8 - j // 8) <= 1),
    "strided": (Strided(8), lambda i, j, n: abs(i - j) < 8 or (i - j) % 8 == 0),
    "comb": (Comb(8), lambda i, j, n: i != j and (i - j) % 8 == 0),
    "fixed": (Fixed(8, 2), lambda i, j, n: i // 8 == j // 8 or j % 8 in (6, 7)),
    "longformer": (Global(5, 3, True), lambda i, j, n: abs(i - j) < 5 or i < 3 or j < 3),
    "streaming": (Global(5, 3, False), lambda i, j, n: abs(i - j) < 5 or j < 3),
}
TOTAL = 61


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", EQUATIONS)
def test_scopes_are_their_equations(name, causal):
    scope, sees = EQUATIONS[name]
    expected = torch.tensor([[sees(i, j, TOTAL) for j in range(TOTAL)] for i in range(TOTAL)])
    place = torch.arange(TOTAL)
    found = scope.sees(place[:, None], place[None], TOTAL, causal)
    assert torch.equal(found, expected)
    expected = expected.tril() if causal else expected
    assert scope.pairs(TOTAL, causal) == int(expected.sum())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", [*EQUATIONS, "bigbird"])
def test_parts_cover_what_is_seen_once(name, causal):
    scope = BigBird(8, 1, 2, 5) if name == "bigbird" else EQUATIONS[name][0]
    place = torch.arange(TOTAL)
    seen = scope.sees(place[:, None], place[None], TOTAL, causal)
    found = torch.zeros(TOTAL, TOTAL, dtype=torch.int64)
    for phase in scope.phases():
        for part in parts(Mask(causal, scope=phase), TOTAL, TOTAL, rows=16):
            here = part.seen(torch.device("cpu"), slice(None))[0, 0]
            rows = torch.zeros(len(here), TOTAL, dtype=torch.int64)
            part.add(rows, here.long(), 1)
            found[part.queries] += rows
    assert torch.equal(found, (seen.tril() if causal else seen).long())


@pytest.mark.parametrize("causal", [True, False])
def test_bigbird_draws_far_blocks(causal):
    scope, blocks = BigBird(8, 1, 3, 7), 20
    for block in range(1, blocks):
        drawn = scope.chosen(block, blocks, causal)
        far = list(range(1, block - 1)) + ([] if causal else [*range(block + 2, blocks)])
        assert len(set(drawn)) == len(drawn) == min(3, len(far))
        assert set(drawn) <= set(far)
    assert scope.chosen(10, blocks, causal) != BigBird(8, 1, 3, 8).chosen(10, blocks, causal)
    counts = torch.zeros(17)
    for key in range(400):
        for i in BigBird(8, 1, 3, key).chosen(19, 20, True):
            counts[i - 1] += 1
    # 400 draws of 3 of 17: mean 70.6, deviation below 7.7.
    assert ((counts - 400 * 3 / 17).abs() < 5 * 7.7).all()


def test_longformer_is_transformers():
    tokens, width, first = 64, 16, 5
    config = LongformerConfig(
        hidden_size=32, num_attention_heads=4, attention_window=[width], attention_probs_dropout_prob=0.0
    )
    theirs = LongformerSelfAttention(config, 0).double().eval()
    for name in ("query", "key", "value"):  # ours has one projection for all
        getattr(theirs, f"{name}_global").load_state_dict(getattr(theirs, name).state_dict())
    x = torch.randn(2, tokens, 32, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(2, tokens, dtype=torch.float64)
    mask[:, :first] = 10000
    them = theirs(x, mask, mask < 0, mask > 0, True)[0]
    q, k, v = (
        getattr(theirs, name)(x).view(2, tokens, 4, 8).transpose(1, 2) for name in ("query", "key", "value")
    )
    for kernel in mechanism("longformer").kernels_on("cpu").values():
        # Theirs counts half the window on each side, ours the places that are less than so many away.
        ours = kernel.compute(q, k, v, Mask(False), window=width // 2 + 1, global_tokens=first)
        ours = ours.transpose(1, 2).flatten(2)
        # Theirs takes its softmax in fp32: roundings of 2^-24.
        torch.testing.assert_close(ours, them, rtol=1e-5, atol=1e-6)
        found = [torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y in (ours, them)]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
