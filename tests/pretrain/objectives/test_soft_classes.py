"""What a classifier learns from a teacher: against torch's cross_entropy and kl_div, with and without a distillation
token (DeiT)."""

import math

import pytest
import torch
import torch.nn.functional as F

from headway.kernels.cross_entropy import IGNORE
from headway.pretrain import config
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.layers import Noise
from headway.pretrain.objectives import build_objective
from headway.pretrain.objectives.soft_classes import SoftClasses
from headway.tests.parallel.family_cases import build, job_of, rows_of

COUNT, CLASSES = 8, 5
ROUNDINGS = {"rtol": 1e-12, "atol": 1e-14}
"""fp64: sums of 8 rows of 5 classes, in another order."""
WAYS = [
    SoftClasses(),
    SoftClasses(hard=False, temperature=3.0, weight=0.1),
    SoftClasses(hard=False, temperature=1.0, weight=0.9, divergence="reverse"),
    SoftClasses(hard=False, temperature=2.0, weight=0.3, divergence="js"),
    SoftClasses(hard=True, temperature=4.0, weight=1.0),
]


def made(distill_token=True, mixed=True, smoothing=0.1, soft=None, pool="first"):
    """An objective in fp64 whose weights are large enough that its answers differ, and a batch with a teacher's."""
    model = {"family": "vit", "layers": 2, "hidden": 24, "heads": 3, "init": {"scheme": "normal", "std": 0.3}}
    job = config.Job.model_validate({
        "model": model | {"vision": {"patch": 2, "distill_token": distill_token}},
        "data": {"images": {"size": 8}},
        "objective": {"name": "classify", "label_smoothing": smoothing, "pool": pool},
        "precision": "fp64",
    })  # fmt: skip
    objective = build_objective(job, Inputs(length=job.row_tokens, image=8, channels=3, classes=CLASSES))
    objective.soft = soft
    rows = rows_of(build(job_of("vit", {}, 4, 12))[1], COUNT)
    if not mixed:
        rows = {name: value for name, value in rows.items() if name not in ("partner", "share")}
    teacher = torch.randn(COUNT, CLASSES, generator=torch.Generator().manual_seed(3)) * 2
    return objective, objective.collate(rows) | {"taught.logits": teacher}


def without(batch, *names):
    return {name: value for name, value in batch.items() if name not in names}


def heads(objective, batch):
    """Logits of both heads, or the one's twice."""
    final = objective.model(batch["pixels"]).final
    first = F.linear(final[:, 0], objective.head.weight, objective.head.bias)
    if objective.head_distill is None:
        return first, first
    return first, F.linear(final[:, 1], objective.head_distill.weight, objective.head_distill.bias)


def targets(batch, smoothing):
    target = F.one_hot(batch["labels"], CLASSES).double()
    if "partner" in batch:
        share = batch["share"].double()[:, None]
        target = share * target + (1 - share) * F.one_hot(batch["partner"], CLASSES)
    return (1 - smoothing) * target + smoothing / CLASSES


def taught(soft, logits, teacher):
    """The teacher's part, summed over rows."""
    if soft.hard:
        return F.cross_entropy(logits, teacher.argmax(1), reduction="sum")
    t = soft.temperature
    p, q = F.log_softmax(teacher.double() / t, 1), F.log_softmax(logits / t, 1)

    def kl(a, b):
        return F.kl_div(b, a, reduction="sum", log_target=True)

    m = ((p.exp() + q.exp()) / 2).log()
    value = {"forward": kl(p, q), "reverse": kl(q, p), "js": (kl(p, m) + kl(q, m)) / 2}[soft.divergence]
    return t**2 * value


def gradients(objective, loss):
    named = dict(objective.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize("soft", WAYS, ids=lambda s: f"{'hard' if s.hard else s.divergence} {s.weight}")
@pytest.mark.parametrize("distill_token", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
def test_the_loss_of_training_is_torchs(soft, distill_token, mixed):
    objective, batch = made(distill_token, mixed, soft=soft)
    out = objective(batch, Noise.at(0, 0, batch["slot"]))
    labelled, learning = heads(objective, batch)
    label_part = F.cross_entropy(labelled, targets(batch, 0.1), reduction="sum")
    teacher_part = taught(soft, learning, batch["taught.logits"])
    expected = soft.task * label_part + soft.weight * teacher_part
    torch.testing.assert_close(out.terms["rows"], expected, **ROUNDINGS)
    torch.testing.assert_close(out.metrics["soft_loss"].sum, teacher_part.detach(), **ROUNDINGS)
    assert not out.metrics["soft_loss"].sum.requires_grad
    assert out.metrics["soft_loss"].over == COUNT
    ours, theirs = (gradients(objective, loss) for loss in (out.terms["rows"], expected))
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-10, atol=1e-11)


def test_each_head_learns_from_its_own_part():
    """Whatever the teacher says, the class head's gradient is that of the labels; and the other way round."""
    objective, batch = made(soft=SoftClasses())
    found = gradients(objective, objective(batch, Noise.at(0, 0, batch["slot"])).terms["rows"])
    other = batch | {"taught.logits": -batch["taught.logits"]}
    changed = gradients(objective, objective(other, Noise.at(0, 0, batch["slot"])).terms["rows"])
    assert torch.equal(found["head.weight"], changed["head.weight"])
    assert not torch.allclose(found["head_distill.weight"], changed["head_distill.weight"])
    other = batch | {"labels": (batch["labels"] + 1) % CLASSES}
    changed = gradients(objective, objective(other, Noise.at(0, 0, batch["slot"])).terms["rows"])
    assert torch.equal(found["head_distill.weight"], changed["head_distill.weight"])
    assert not torch.allclose(found["head.weight"], changed["head.weight"])


@pytest.mark.parametrize("distill_token", [True, False])
@pytest.mark.parametrize("teacher", [True, False])
def test_held_out_images_are_answered_by_both_heads(distill_token, teacher):
    """The loss is that of the labels alone, whether or not a teacher is asked too."""
    soft = WAYS[1]
    objective, batch = made(distill_token, mixed=False, soft=soft)
    out = objective(batch if teacher else without(batch, "taught.logits"))
    each = heads(objective, batch)
    answer = sum(each) / 2
    torch.testing.assert_close(objective.logits(batch["pixels"]), answer, **ROUNDINGS)
    torch.testing.assert_close(
        out.terms["rows"], F.cross_entropy(answer, batch["labels"], reduction="sum"), **ROUNDINGS
    )
    assert out.metrics["accuracy"].sum == (answer.argmax(1) == batch["labels"]).sum()
    assert ("soft_loss" in out.metrics) == teacher
    if teacher:
        expected = taught(soft, each[1], batch["taught.logits"]).detach()
        torch.testing.assert_close(out.metrics["soft_loss"].sum, expected, **ROUNDINGS)


def test_without_a_teacher_both_heads_learn_the_labels_together():
    """As timm trains and fine-tunes: the loss is that of the mean of both."""
    objective, batch = made()
    noise, expected = Noise.at(0, 0, batch["slot"]), sum(heads(objective, batch)) / 2
    expected = F.cross_entropy(expected, targets(batch, 0.1), reduction="sum")
    for given in (batch, without(batch, "taught.logits")):  # a teacher that the job does not ask for
        out = objective(given, noise)
        torch.testing.assert_close(out.terms["rows"], expected, **ROUNDINGS)
        assert set(out.metrics) == {"accuracy"}
    objective.soft = SoftClasses()
    out = objective(without(batch, "taught.logits"), noise)
    torch.testing.assert_close(out.terms["rows"], expected, **ROUNDINGS)


def test_the_mean_of_patches_leaves_both_tokens_out():
    objective, batch = made(pool="mean", soft=SoftClasses())
    assert objective.outputs is None
    final = objective.model(batch["pixels"]).final
    first = F.linear(final[:, 2:].mean(1), objective.head.weight, objective.head.bias)
    second = F.linear(final[:, 1], objective.head_distill.weight, objective.head_distill.bias)
    torch.testing.assert_close(objective.logits(batch["pixels"]), (first + second) / 2, **ROUNDINGS)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("soft", WAYS[:2])
def test_rows_that_are_not_scored_teach_nothing(soft, training):
    objective, batch = made(mixed=False, soft=soft)
    real = torch.arange(COUNT) % 3 > 0
    held = batch | {"labels": batch["labels"].masked_fill(~real, IGNORE)}

    def run(given):
        return objective(given, Noise.at(0, 0, given["slot"]) if training else None)

    out, expected = run(held), run({name: value[real] for name, value in batch.items()})
    torch.testing.assert_close(out.terms["rows"], expected.terms["rows"], **ROUNDINGS)
    torch.testing.assert_close(out.metrics["soft_loss"], expected.metrics["soft_loss"], **ROUNDINGS)


def test_a_student_that_answers_as_its_teacher_has_nothing_to_learn():
    logits = torch.randn(3, CLASSES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for soft in (way for way in WAYS if not way.hard):
        x = logits.clone().requires_grad_()
        loss = soft.loss(x, logits + 7)  # a constant changes no distribution
        loss.sum().backward()
        # fp64, and logits of up to 9: differences of logarithms are off by 1e-15, squared temperatures of up to 9
        torch.testing.assert_close(loss.detach(), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-13)
        torch.testing.assert_close(x.grad, torch.zeros_like(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
def test_answers_that_are_all_but_certain_stay_finite(kind):
    """One puts everything on a class that the other all but excludes; the distance of js is at most ln 2."""
    soft = SoftClasses(hard=False, divergence=kind)
    teacher, x = torch.tensor([[0.0, 2000.0]]), torch.tensor([[2000.0, 0.0]], requires_grad=True)
    loss = soft.loss(x, teacher)
    loss.sum().backward()
    assert x.grad.isfinite().all()
    # exp(-2000) is 0, so a KL is 1 x 2000 exactly; fp32 knows ln 2 to 6e-8
    assert loss.item() == pytest.approx(math.log(2) if kind == "js" else 2000.0, rel=1e-6)


@pytest.mark.parametrize("hard", [True, False])
def test_a_teacher_of_other_classes_is_refused(hard):
    objective, batch = made(soft=SoftClasses(hard=hard))
    with pytest.raises(ValueError, match=r"teacher_logits have shape \[8, 6\], the student's \[8, 5\]"):
        objective(batch | {"taught.logits": torch.zeros(COUNT, 6)})


def test_counts_are_those_of_the_tokens():
    objective, batch = made()
    assert objective.counts(batch) == {"rows": COUNT, "read": COUNT * 18}
