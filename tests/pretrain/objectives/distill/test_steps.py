"""What changes from step to step: windows, layers one by one, parts that rest; and what an evaluation tells."""

import pytest
import torch
import torch.nn.functional as F

from headway.pretrain.config.distill import Distill
from headway.pretrain.objectives.distill.lessons import Lesson, active, frozen_below

from .twins import TARGET, Twins, kl_of_maps, look_at_both, make, masked_batch, numbered, real, words

SEEN = real()
STILL = {"optimizer": {"lr": 1e-30}}


def task_of(ours, batch):
    chosen = batch["labels"] != -100
    return F.cross_entropy(ours.logits[chosen], batch["labels"][chosen])


def means(x):
    return torch.stack([row[seen].mean(0) for row, seen in zip(x, SEEN, strict=True)])


def test_parts_of_the_loss_come_and_go(tmp_path):
    """`begin` is the first step that has a part, `end` the first that has it no more."""
    distill = {
        "logits": {"weight": 1.0, "begin": 1, "end": 3},
        "attention": {"weight": 1.0, "begin": 2, "layers": "last"},
        "states": {"weight": 1.0, "end": 2, "layers": "last"},
        "final": {"weight": 1.0, "begin": 3},
        "contrast": {"weight": 1.0, "begin": 1, "end": 2, "width": 6, "queue": 6},
    }
    twins = Twins(make("bert"), make("bert", 1, hidden=30), tmp_path, distill, STILL)
    batch, inputs = masked_batch()
    filled = []
    for step in range(4):
        ours, theirs = look_at_both(twins, **inputs)
        parts, last = {}, ours.states[2]
        if step in (1, 2):
            chosen = batch["labels"] != -100
            logs = [F.log_softmax(x.logits[chosen], -1) for x in (ours, theirs)]
            parts["soft_loss"] = F.kl_div(*logs, reduction="batchmean", log_target=True)
        if step >= 2:
            parts["learned/attention"] = kl_of_maps(theirs.maps[1], ours.maps[1], SEEN)
        if step < 2:
            x = twins.linear("model.blocks.1.tap.project", last)
            parts["learned/states"] = F.mse_loss(x[SEEN], theirs.states[2][SEEN])
        if step == 3:
            x = twins.linear("distillation.project", last)
            parts["learned/final"] = (1 - F.cosine_similarity(x, theirs.states[2], -1)[SEEN]).mean()
        if step == 1:
            z = twins.linear("distillation.contrast.project", means(last))
            t = twins.linear("distillation.contrast.project_teacher", means(theirs.states[2]))
            cosines = F.normalize(z, dim=-1) @ F.normalize(t, dim=-1).T
            parts["contrast"] = F.cross_entropy(cosines / 0.07, torch.arange(4))
        result = twins.check(batch, task_of(ours, batch) + sum(parts.values()), step)
        assert result.metrics.keys() == parts.keys() | {"task_loss", "accuracy"}, step
        filled.append(int(twins.objective.distillation.contrast.filled))
        twins.student.zero_grad()
        twins.leaves.clear()
    assert filled == [0, 4, 4, 4]


def test_a_teacher_is_not_asked_outside_of_all_windows(tmp_path):
    twins = Twins(make("gpt2"), make("gpt2", 1), tmp_path, {"attention": {"weight": 1.0, "begin": 1}})
    batch = numbered({"tokens": words(), "labels": words(seed=1)})
    assert list(twins.engine.teacher.teach([batch], 0)) == [{}]
    assert next(twins.engine.teacher.teach([batch], 1))


# -- layers one by one -----------------------------------------------------------------------------------------


def moved(before, objective):
    """Names of the parameters that are other bits than before."""
    return {name for name, p in objective.named_parameters() if not torch.equal(p, before[name])}


def block_of(name):
    """Number of a parameter's block; -1 outside of blocks."""
    parts = name.split(".")
    return int(parts[parts.index("blocks") + 1]) if "blocks" in parts else -1


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "muon"])
def test_layers_are_matched_one_by_one_and_those_below_rest(optimizer, tmp_path):
    """MobileBERT, section 3.3: while a layer is matched, those below and the embeddings stay the same bits, whatever
    the decay of weights and the moments of steps before; then all go on."""
    each = {"weight": 1.0, "begin": 1, "progressive": 2}
    distill = {"attention": each, "states": each | {"layers": "top", "loss": "normalised"}}
    more = {"optimizer": {"name": optimizer}}
    twins = Twins(make("bert", layers=3), make("bert", 1, layers=6), tmp_path, distill, more)
    batch, _ = masked_batch()
    for step in range(8):
        matched = (step - 1) // 2 if step else None
        below = matched if matched is not None and matched < 3 else 0
        before = {name: p.detach().clone() for name, p in twins.objective.named_parameters()}
        result, _ = twins.step(batch, step)
        rest = {n for n in before if below and ("embed" in n or -1 < block_of(n) < below)}
        learned = {n for n, p in twins.objective.named_parameters() if p.requires_grad}
        assert moved(before, twins.objective) == learned - rest, step
        expected = {"learned/attention", "learned/states"} if matched in (0, 1, 2) else set()
        assert {n for n in result.metrics if n.startswith("learned/")} == expected, step


def test_the_layer_that_is_matched_is_matched_alone(tmp_path):
    distill = {"task": 0.0, "attention": {"weight": 1.0, "progressive": 1, "layers": [3, 1]}}
    twins = Twins(make("bert"), make("bert", 1, layers=4), tmp_path, distill, STILL)
    batch, inputs = masked_batch()
    ours, theirs = look_at_both(twins, **inputs)
    twins.check(batch, kl_of_maps(theirs.maps[3], ours.maps[0], SEEN), 0)
    twins.student.zero_grad()
    ours, theirs = look_at_both(twins, **inputs)
    second = kl_of_maps(theirs.maps[1], ours.maps[1], SEEN)
    result, found = twins.step(batch, 1)
    assert result.loss == pytest.approx(second.item(), rel=1e-11)
    second.backward()
    expected = twins.gradients()
    assert {n for n in found if block_of(n) == 1} == {n for n in expected if block_of(n) == 1}
    for name, g in found.items():  # of the others there are none
        torch.testing.assert_close(g, expected[name], rtol=1e-10, atol=1e-13)
    assert not {n for n in found if block_of(n) == 0 or "embed.positions" in n}


def test_the_longer_tower_says_when_layers_one_by_one_are_done(tmp_path):
    """T5 with three blocks in the decoder and one in the encoder."""
    distill = {"attention": {"weight": 1.0, "progressive": 1}}
    student, teacher = (make("t5", seed, layers=1, num_decoder_layers=3) for seed in (0, 1))
    twins = Twins(student, teacher, tmp_path, distill, {"objective": {"name": "pairs"}})
    batch = numbered({"tokens": words(), "targets": words(TARGET, 1), "labels": words(TARGET, 2)})
    for step in range(4):
        before = {name: p.detach().clone() for name, p in twins.objective.named_parameters()}
        twins.step(batch, step)
        still = {n for n in before if block_of(n) >= 0} - moved(before, twins.objective)
        assert still == {n for n in before if step < 3 and -1 < block_of(n) < step}, step


@pytest.mark.parametrize(
    ("step", "layer", "below"), [(4, None, 0), (5, 0, 0), (7, 0, 0), (8, 1, 1), (13, 2, 2), (14, None, 0)]
)
def test_which_layer_a_step_matches(step, layer, below):
    settings = Distill.model_validate({"attention": {"weight": 1.0, "begin": 5, "progressive": 3}})
    found = [i for i in range(3) if active(settings.attention, Lesson(0, i, attention=i), step)]
    assert found == ([] if layer is None else [layer])
    assert frozen_below(settings, 3, step) == below


# -- evaluation ------------------------------------------------------------------------------------------------


def test_an_evaluation_tells_the_task_and_what_is_learned(tmp_path):
    """Held-out loss is the objective's own, without weights. Rows that fill up a batch count nowhere. Windows do not
    hide what a held-out row says."""
    distill = {
        "task": 0.3,
        "logits": {"weight": 2.0},
        "attention": {"weight": 5.0, "begin": 9},
        "contrast": {"weight": 1.0},
    }
    twins = Twins(make("bert"), make("bert", 1), tmp_path, distill)
    batch, inputs = masked_batch()
    there = torch.tensor([True, False, True, True])
    batch["real"], batch["labels"] = there, batch["labels"].masked_fill(~there[:, None], -100)
    found = twins.engine.evaluate(batch)
    ours, theirs = look_at_both(twins, **inputs)
    chosen = batch["labels"] != -100
    logs = [F.log_softmax(x.logits[chosen], -1) for x in (ours, theirs)]
    pairs = list(zip(theirs.maps, ours.maps, strict=True))
    expected = {
        "loss": F.cross_entropy(ours.logits[chosen], batch["labels"][chosen]),
        "soft_loss": F.kl_div(*logs, reduction="batchmean", log_target=True),
        "learned/attention": torch.stack(
            [kl_of_maps(p[there], q[there], SEEN[there]) for p, q in pairs]
        ).mean(),
    }
    assert found.keys() == expected.keys() | {"accuracy"}
    for name, value in expected.items():
        total, count = found[name]
        assert total / count == pytest.approx(value.item(), rel=1e-11), name
