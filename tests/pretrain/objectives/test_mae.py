"""Masked autoencoding: the loss is ViTMAE's, hidden patches are chosen evenly, pictures show what was hidden."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from headway.pretrain.config import Job
from headway.pretrain.data.samples import make_keys
from headway.pretrain.models.embeddings import patchify
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.objectives import build_objective
from headway.pretrain.objectives.mae import hidden_patches
from headway.tests.parallel.family_cases import build, job_of, rows_of

COUNT, PATCHES = 6, 16


def made(rate=0.75, normalise=True, class_token=True, precision="fp64"):
    vision = {"patch": 2, "class_token": class_token}
    mae = {"layers": 1, "hidden": 20, "heads": 2, "rate": rate, "normalise": normalise}
    job = Job.model_validate(
        {
            "model": {"family": "vit", "layers": 1, "hidden": 24, "heads": 3, "vision": vision},
            "data": {"images": {"size": 8}},
            "objective": {"name": "mae", "mae": mae},
            "precision": precision,
        }
    )
    objective = build_objective(job, Inputs(length=PATCHES + class_token, image=8, channels=3))
    return objective, rows_of(build(job_of("mae", {}, 4, 12))[1], COUNT)


def their_loss(pixels, painted, hidden, normalise):
    """transformers' loss of what we painted; it takes a patch's values in the order (row, column, channel)."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    settings = ViTMAEConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=8, patch_size=2,
        decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=1,
        decoder_intermediate_size=8, norm_pix_loss=normalise,
    )  # fmt: skip
    theirs = ViTMAEForPreTraining(settings)
    order = painted.unflatten(-1, (3, 4)).transpose(-1, -2).flatten(-2)
    nothing = {"hidden_states": None, "attentions": None, "last_hidden_state": None, "ids_restore": None}
    theirs.vit = Says(SimpleNamespace(mask=hidden.to(pixels.dtype), **nothing))
    theirs.decoder = Says(SimpleNamespace(logits=order))
    return theirs(pixels).loss


class Says(torch.nn.Module):
    """In place of a model whose answer is known."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, *_, **__):
        return self.answer


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("class_token", [True, False])
def test_loss_is_vitmaes(normalise, class_token):
    objective, rows = made(normalise=normalise, class_token=class_token)
    batch = objective.collate(rows)
    out, counts = objective(batch), objective.counts(batch)
    painted = objective.decoder(objective.model(batch["pixels"], batch["visible"]).final, batch["visible"])
    expected = their_loss(batch["pixels"].double(), painted, batch["scored"], normalise)
    assert counts == {"patches": COUNT * 12, "rows": COUNT, "read": COUNT * (4 + class_token)}
    torch.testing.assert_close(out.terms["patches"] / counts["patches"], expected, rtol=1e-12, atol=0)
    assert out.terms["patches"].dtype == torch.float64


def test_visible_patches_are_a_function_of_the_key_and_even():
    objective, rows = made()
    count = 4000
    keys = make_keys("rows", 0, range(count), [0] * count)
    pixels = np.zeros((count, 3, 8, 8), np.float32)
    batch = objective.collate({"pixels": pixels, "key": keys, "slot": np.arange(count)})
    visible = batch["visible"]
    assert visible.shape == (count, 4)
    assert (visible.diff(dim=1) > 0).all()
    assert torch.equal(batch["scored"], hidden_patches(visible, PATCHES))
    # Patches (and pairs of them) are seen as often as the hypergeometric law says, within five deviations.
    seen = (~batch["scored"]).double()
    together = seen.T @ seen / count
    for share, found in ((4 / 16, together.diagonal()), (4 * 3 / (16 * 15), together[~torch.eye(16).bool()])):
        assert (found - share).abs().max() < 5 * (share * (1 - share) / count) ** 0.5
    order = np.random.default_rng(0).permutation(COUNT)
    batch = objective.collate(rows)
    shuffled = objective.collate({key: value[order] for key, value in rows.items()})
    assert all(torch.equal(shuffled[key], value[order]) for key, value in batch.items())


@pytest.mark.parametrize(("rate", "visible"), [(0.75, 4), (0.5, 8), (0.7, 4), (0.99, 1), (0.0, 16)])
def test_shares_are_those_of_he_et_al(rate, visible):
    """int(N (1 - rate)), and never less than one patch."""
    assert made(rate)[0].visible == visible


def test_rows_that_are_not_scored_count_nothing():
    objective, rows = made()
    real = np.arange(COUNT) % 3 > 0
    held, part = objective.collate(rows | {"scored": real}), objective.collate(rows)
    part = {key: value[real] for key, value in part.items()}
    assert objective.counts(held)["patches"] == objective.counts(part)["patches"]
    torch.testing.assert_close(
        objective(held).terms["patches"], objective(part).terms["patches"], rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("normalise", [True, False])
def test_pictures_paint_hidden_patches_only(normalise):
    objective, rows = made(normalise=normalise, precision="fp32")
    batch = objective.collate(rows)
    seen, whole = objective.reconstruct(batch)
    pixels = batch["pixels"]
    assert seen.shape == whole.shape == pixels.shape
    before, shown, painted = (patchify(x, 2) for x in (pixels, seen, whole))
    hidden = batch["scored"]
    assert shown[hidden].isnan().all()
    assert torch.equal(shown[~hidden], before[~hidden])
    assert torch.equal(painted[~hidden], before[~hidden])
    raw = objective.decoder(objective.model(pixels, batch["visible"]).final, batch["visible"])[hidden]
    true = before[hidden]
    if normalise:
        raw = raw * (true.var(-1, keepdim=True) + 1e-6).sqrt() + true.mean(-1, keepdim=True)
    torch.testing.assert_close(painted[hidden], raw)
