"""Soft targets through real objectives, against torchdistill's loss and torch's KL of transformers' logits."""

import pytest
import torch
import torch.nn.functional as F

from headway.tests import oracles

from .twins import ROWS, TARGET, VOCAB, Twins, look_at_both, make, masked_batch, numbered, words

TEMPERATURE, WEIGHT, TASK = 2.0, 0.7, 0.4


def causal():
    tokens, labels = words(), words(seed=1)
    labels[1, 5:] = -100
    return numbered({"tokens": tokens, "labels": labels}), {"input_ids": tokens}


def seq2seq():
    tokens, targets, labels = words(), words(TARGET, 1), words(TARGET, 2)
    labels[2, 4:] = -100
    batch = numbered({"tokens": tokens, "targets": targets, "labels": labels})
    return batch, {"input_ids": tokens, "decoder_input_ids": targets}


KINDS = {"gpt2": (causal, {}), "bert": (masked_batch, {}), "t5": (seq2seq, {"objective": {"name": "pairs"}})}


def both(kind, place, logits, task=TASK):
    """Twins, Headway's batch, and logits of student and teacher at the places that have a label, with the labels."""
    batch_of, more = KINDS[kind]
    batch, inputs = batch_of()
    distill = {"task": task, "logits": {"weight": WEIGHT, "temperature": TEMPERATURE} | logits}
    twins = Twins(make(kind), make(kind, 1, layers=3, hidden=32, heads=4), place, distill, more)
    student, teacher = look_at_both(twins, **inputs)
    chosen = batch["labels"] != -100
    return twins, batch, student.logits[chosen], teacher.logits[chosen], batch["labels"][chosen]


@pytest.mark.parametrize("kind", KINDS)
def test_all_words_are_torchdistills(kind, tmp_path):
    twins, batch, student, teacher, labels = both(kind, tmp_path, {})
    loss = oracles.distillation()[0]("head", "output", "head", "output", TEMPERATURE, TASK, WEIGHT)
    expected = loss({"head": {"output": student}}, {"head": {"output": teacher}}, labels)
    result = twins.check(batch, expected)
    assert result.metrics["task_loss"] == pytest.approx(F.cross_entropy(student, labels).item(), rel=1e-12)


def outcomes(student, teacher, k):
    """Log-probabilities of the teacher's k likeliest words and of any other, at the temperature."""
    top = teacher.topk(k).indices
    for logits in (teacher, student):
        log_p = F.log_softmax(logits / TEMPERATURE, -1)
        rest = (1 - log_p.exp().gather(1, top).sum(1, keepdim=True)).log()
        yield torch.cat((log_p.gather(1, top), rest), 1)


def divergence(log_p, log_q, kind):
    """By torch's KL, mean over rows."""

    def kl(p, q):
        return F.kl_div(q, p, reduction="batchmean", log_target=True)

    if kind != "js":
        return kl(log_p, log_q) if kind == "forward" else kl(log_q, log_p)
    log_m = ((log_p.exp() + log_q.exp()) / 2).log()
    return (kl(log_p, log_m) + kl(log_q, log_m)) / 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("direction", "k"), [("forward", 6), ("reverse", None), ("js", 6)])
def test_directions_and_likeliest_words_are_torchs(kind, direction, k, tmp_path):
    twins, batch, student, teacher, labels = both(kind, tmp_path, {"divergence": direction, "top_k": k})
    if k:
        log_p, log_q = outcomes(student, teacher, k)
    else:
        log_p, log_q = (F.log_softmax(x / TEMPERATURE, -1) for x in (teacher, student))
    soft = TEMPERATURE**2 * divergence(log_p, log_q, direction)
    result = twins.check(batch, TASK * F.cross_entropy(student, labels) + WEIGHT * soft)
    assert result.metrics["soft_loss"] == pytest.approx(soft.item(), rel=1e-11)


def test_the_teacher_alone(tmp_path):
    """Without the objective's own loss labels say where, not what."""
    twins, batch, student, teacher, _ = both("gpt2", tmp_path, {}, task=0.0)
    soft = F.kl_div(
        *(F.log_softmax(x / TEMPERATURE, -1) for x in (student, teacher)),
        reduction="batchmean",
        log_target=True,
    )
    twins.check(batch, WEIGHT * TEMPERATURE**2 * soft)


def test_all_words_are_the_likeliest_when_k_is_the_vocabulary(tmp_path):
    few = both("gpt2", tmp_path / "few", {"top_k": VOCAB})
    every = both("gpt2", tmp_path / "every", {})
    losses = [twins.step(batch)[0].loss for twins, batch, *_ in (few, every)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert len(few[1]["tokens"]) == ROWS
