"""DeiT with transformers, beside what `test_families` asks of all: fp64, each head, what cannot be exported."""

import pytest
import torch

from headway.pretrain.config import Job
from headway.pretrain.errors import JobError
from headway.pretrain.hf import family_of_job
from headway.pretrain.hf.deit import DEIT
from headway.pretrain.hf.folder import open_folder
from headway.pretrain.hf.vit import VIT
from headway.pretrain.hf.writing import inputs_of
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.objectives import build_objective

from . import models


@torch.no_grad()
def test_both_heads_are_transformers_in_fp64(tmp_path):
    theirs = models.make("deit").double()
    theirs.set_attn_implementation("sdpa")  # its own softmax is fp32 whatever the model is
    theirs.save_pretrained(tmp_path)
    folder = open_folder(tmp_path)
    weights = dict(folder.tensors())
    job = folder.job.model_copy(update={"precision": "fp64"})
    ours = build_objective(job, inputs_of(job, {name: tuple(t.shape) for name, t in weights.items()}))
    ours.load_state_dict(weights, strict=True)
    x = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected, final = theirs(x), ours.model(x).final
    # fp64, two layers of sums of at most 50 products: 1e-14 each
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(ours.logits(x), expected.logits, **close)
    torch.testing.assert_close(ours.head(final[:, 0]), expected.cls_logits, **close)
    torch.testing.assert_close(ours.head_distill(final[:, 1]), expected.distillation_logits, **close)


def job(distill_token, pool="first"):
    model = {"family": "vit", "layers": 1, "hidden": 24, "heads": 3, "activation": "gelu"}
    return Job.model_validate({
        "model": model | {"vision": {"patch": 4, "distill_token": distill_token}},
        "data": {"images": {"size": 12}},
        "objective": {"name": "classify", "pool": pool},
    })  # fmt: skip


def test_the_token_decides_what_a_classifier_is():
    assert family_of_job(job(False)) is VIT
    assert family_of_job(job(True)) is DEIT
    inputs = Inputs(image=12, channels=3, classes=7)
    found = DEIT.to_hf(job(True), inputs)
    assert found["architectures"] == ["DeiTForImageClassificationWithTeacher"]
    assert len(found["id2label"]) == 7
    with pytest.raises(JobError, match=r"model\.vision\.distill_token = True: a vit model .* no other value"):
        VIT.to_hf(job(True), inputs)
    with pytest.raises(JobError, match=r"objective\.pool = 'mean': a deit model .* no other value"):
        DEIT.to_hf(job(True, "mean"), inputs)
