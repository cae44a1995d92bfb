"""Classification of images: mixed labels, smoothing, pooling, what is counted."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from headway.kernels.cross_entropy import IGNORE
from headway.pretrain import config
from headway.pretrain.data.images.samples import ImageSamples
from headway.pretrain.data.images.sources import open_images
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.layers import Noise
from headway.pretrain.objectives import build_objective
from headway.tests.parallel.family_cases import build, job_of, rows_of

COUNT = 8


def made(**objective):
    """An objective without dropout, so that training differs from evaluation in the loss alone, and its rows."""
    model = {"family": "vit", "layers": 2, "hidden": 24, "heads": 3, "vision": {"patch": 2}}
    job = config.Job.model_validate(
        {
            "model": model,
            "data": {"images": {"size": 8}},
            "objective": {"name": "classify"} | objective,
            "precision": "fp64",
        }
    )
    _, samples = build(job_of("vit", {}, 4, 12))
    built = build_objective(job, Inputs(length=17, image=8, channels=3, classes=5))
    return built, rows_of(samples, COUNT)


def plain(rows):
    return {key: value for key, value in rows.items() if key not in ("partner", "share")}


def test_collate():
    objective, rows = made()
    batch = objective.collate(rows)
    assert set(batch) == {"pixels", "labels", "partner", "share", "sample", "slot"}
    assert batch["pixels"].shape == (COUNT, 3, 8, 8)
    np.testing.assert_array_equal(batch["labels"], rows["label"])
    np.testing.assert_array_equal(batch["partner"], rows["partner"])
    real = np.arange(COUNT) % 3 > 0
    held = objective.collate(rows | {"scored": real})
    for key in ("labels", "partner"):
        np.testing.assert_array_equal(held[key] == IGNORE, ~real)
    assert objective.counts(held) == {"rows": real.sum(), "read": COUNT * 17}
    assert set(objective.collate(plain(rows))) == {"pixels", "labels", "sample", "slot"}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_loss_is_torchs_with_mixed_targets(smoothing, mixed, training):
    objective, rows = made(label_smoothing=smoothing)
    batch = objective.collate(rows if mixed else plain(rows))
    out = objective(batch, Noise.at(0, 0, batch["slot"]) if training else None)
    logits = objective.logits(batch["pixels"])
    target = F.one_hot(batch["labels"], 5).double()
    if mixed:
        share = batch["share"].double()[:, None]
        target = share * target + (1 - share) * F.one_hot(batch["partner"], 5)
    if training:  # held-out loss is not smoothed
        target = (1 - smoothing) * target + smoothing / 5
    torch.testing.assert_close(
        out.terms["rows"], F.cross_entropy(logits, target, reduction="sum"), rtol=1e-12, atol=0
    )
    assert out.metrics["accuracy"].sum == (logits.argmax(1) == batch["labels"]).sum()
    assert out.metrics["accuracy"].over == COUNT


def test_rows_that_are_not_scored_count_nothing():
    objective, rows = made()
    real = np.arange(COUNT) % 3 > 0
    held, part = objective.collate(plain(rows) | {"scored": real}), objective.collate(plain(rows))
    out, expected = objective(held), objective({key: value[real] for key, value in part.items()})
    torch.testing.assert_close(out.terms["rows"], expected.terms["rows"], rtol=1e-12, atol=0)
    assert out.metrics["accuracy"] == expected.metrics["accuracy"]


def test_pooling():
    first, rows = made()
    mean, _ = made(pool="mean")
    mean.load_state_dict(first.state_dict())
    pixels = torch.from_numpy(rows["pixels"])
    final = first.model(pixels).final
    assert final.shape == (COUNT, 17, 24)
    for objective, pooled in ((first, final[:, 0]), (mean, final[:, 1:].mean(1))):
        expected = F.linear(pooled, first.head.weight, first.head.bias)
        torch.testing.assert_close(objective.logits(pixels), expected, rtol=1e-12, atol=1e-14)


def test_real_images_train_in_every_precision():
    """The digits of scikit-learn by their own source: fp32 pixels, whatever the model's dtype."""
    job = config.Job.model_validate(
        {
            "model": {"family": "vit", "layers": 1, "hidden": 24, "heads": 3, "vision": {"patch": 4}},
            "data": {"sources": "sklearn:digits", "images": {"size": 8, "channels": 1}},
            "objective": {"name": "classify", "augment": {"shift": 0.125, "cutmix": 1.0}},
        }
    )
    source = open_images(job.data.sources[0], job.data)
    samples = ImageSamples(source, source.side(False, True), job.data.images, job.objective.augment, True)
    rows = rows_of(samples, COUNT)
    losses = []
    for precision in ("fp32", "fp64"):
        same = job.model_copy(update={"precision": precision})
        objective = build_objective(same, Inputs(length=5, image=8, channels=1, classes=len(source.classes)))
        out = objective(objective.collate(rows))
        out.terms["rows"].backward()
        losses.append(out.terms["rows"].item() / COUNT)
        assert out.terms["rows"].dtype == (torch.float64 if precision == "fp64" else torch.float32)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
