"""Initial weights: slices, moments, meta devices."""

import math

import pytest
import torch

from headway.pretrain import config
from headway.pretrain.models.init import Slice, fill, initialise, whole
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.schemes import Fill
from headway.pretrain.objectives import build_objective

MODEL = config.Model(layers=2, hidden=40, heads=4, dropout=0.1)
JOB = config.Job(model=MODEL, data=config.Data(seq_len=16))
INPUTS = Inputs(vocab=50, length=16)


KINDS = [Fill("normal", 0.02), Fill("truncated", 0.02), Fill("uniform", 0.3), Fill("orthogonal", 1.4)]


@pytest.mark.parametrize("how", KINDS, ids=lambda how: how.kind)
@pytest.mark.parametrize("offset", [(0, 0, 0), (1, 3, 5), (2, 0, 9), (2, 6, 12), (3, 0, 0), (0, 0, 13)])
def test_any_slice_has_the_bits_of_the_whole(offset, how):
    shape = (3, 7, 13)
    full = torch.empty(shape)
    fill(whole(full), "name", how, 5)
    local = torch.empty([s - o for s, o in zip(shape, offset, strict=True)])
    fill(Slice(local, shape, offset), "name", how, 5)
    assert torch.equal(local, full[tuple(slice(o, None) for o in offset)])


def test_ranks_fill_their_own_rows():
    one, many = (
        build_objective(JOB, INPUTS),
        build_objective(JOB, INPUTS, device="meta").to_empty(device="cpu"),
    )
    for rank in range(3):

        def rows(name, parameter, rank=rank):
            n = parameter.shape[0]
            a, b = rank * n // 3, (rank + 1) * n // 3
            return Slice(parameter[a:b], tuple(parameter.shape), (a, *[0] * (parameter.dim() - 1)))

        initialise(many, MODEL, JOB.train.seed, rows)
    for (name, a), b in zip(one.named_parameters(), many.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_meta_then_materialised_is_the_same_model():
    meta = build_objective(JOB, INPUTS, device="meta")
    assert all(t.is_meta for t in (*meta.parameters(), *meta.buffers()))
    built = meta.to_empty(device="cpu")
    initialise(built, MODEL, JOB.train.seed)
    expected = build_objective(JOB, INPUTS)
    for (name, a), b in zip(built.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b), name
    salts = [b.item() for b in built.buffers()]
    assert salts == [b.item() for b in expected.buffers()]
    assert len(set(salts)) == len(salts)
    assert not [n for n in built.state_dict() if "salt" in n]


def test_deviations_are_gpt2s():
    wide = config.Job(model=MODEL.model_copy(update={"hidden": 256}), data=config.Data(seq_len=16))
    for name, p in build_objective(wide, INPUTS._replace(vocab=500)).named_parameters():
        if p.dim() == 1:
            assert (p == float(name.endswith("norm.weight"))).all(), name
        else:
            into_stream = name.endswith(("attention.o.weight", "mlp.down.weight"))
            std = 0.02 / math.sqrt(4) if into_stream else 0.02
            # The deviation of a sample's deviation is std / sqrt(2 n); five of them.
            assert abs(p.std().item() / std - 1) < 5 / math.sqrt(2 * p.numel()), name


def test_seed_and_name_matter():
    a, b = (build_objective(config.Job(model=MODEL, train=config.Train(seed=s)), INPUTS) for s in (0, 1))
    first, second = a.model.blocks
    assert not torch.equal(a.model.embed.tokens.weight, b.model.embed.tokens.weight)
    assert not torch.equal(first.mlp.up.weight, second.mlp.up.weight)


def test_fp64_starts_from_the_same_weights():
    double = JOB.model_copy(update={"precision": "fp64"})
    for a, b in zip(
        build_objective(JOB, INPUTS).parameters(), build_objective(double, INPUTS).parameters(), strict=True
    ):
        assert b.dtype == torch.float64
        # The product with the deviation is rounded to fp32 or not: one rounding.
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=0)
