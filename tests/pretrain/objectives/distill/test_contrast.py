"""Contrast of representations against torch's cross-entropy and torchdistill's CRD; of rows of maps, against maps."""

import pytest
import torch
import torch.nn.functional as F

from headway.pretrain.config.distill import Contrast
from headway.pretrain.objectives.distill.contrast import Contrastive
from headway.tests import oracles

from .twins import LENGTH, ROWS, Twins, look_at_both, make, masked_batch, numbered, real, words

SEEN = real()
STILL = {"optimizer": {"lr": 1e-30}}
"""So that weights are the same bits after a step."""


def pair(place, contrast, more=None):
    distill = {"task": 0.0, "contrast": {"weight": 0.7, "width": 10, "temperature": 0.2} | contrast}
    return Twins(make("bert"), make("bert", 1, hidden=32, heads=4), place, distill, more)


def means(seen):
    """Of the last hidden states of places that are no padding, [B, E]."""
    x = seen.states[-1]
    return torch.stack([row[real].mean(0) for row, real in zip(x, SEEN, strict=True)])


def projected(twins, ours, theirs):
    """Representations by the student [B, W], and by the teacher [M, W], of norm 1."""
    z = twins.linear("distillation.contrast.project", ours)
    return F.normalize(z, dim=-1), F.normalize(
        twins.linear("distillation.contrast.project_teacher", theirs), dim=-1
    )


def test_codir_is_infonce_over_the_global_batch(tmp_path):
    """What CLIP's loss has of rows (open_clip `ClipLoss`): cross-entropy. In two micro-batches of a global batch."""
    twins = pair(tmp_path, {})
    batch, inputs = masked_batch()
    z, t = projected(twins, *(means(x) for x in look_at_both(twins, **inputs)))
    loss = F.cross_entropy(z @ t.T / 0.2, torch.arange(ROWS))
    result = twins.check(batch, 0.7 * loss)
    assert result.metrics["contrast"] == pytest.approx(loss.item(), rel=1e-11)


def test_crd_is_torchdistills_with_as_much_noise_as_data(tmp_path):
    """h = e^g / (e^g + N / M), of N = M; torchdistill keeps memory for negatives, which are given here."""
    twins = pair(tmp_path, {"kind": "crd"})
    batch, inputs = masked_batch()
    z, t = projected(twins, *(means(x) for x in look_at_both(twins, **inputs)))
    others = torch.stack([(torch.arange(ROWS) + i) % ROWS for i in range(ROWS)])  # the sample itself first
    scores = (z @ t.T / 0.2).exp().gather(1, others)
    theirs = oracles.torchdistill().CRDLoss("s", "e", "t", 10, 8, ROWS - 1, ROWS - 1, eps=0.0)
    twins.check(batch, 0.7 * theirs.compute_contrast_loss(scores[..., None]).squeeze())


@pytest.mark.parametrize("kind", ["codir", "crd"])
def test_samples_of_steps_before_are_told_from_too(kind, tmp_path):
    """Of three steps, the first fills 4 of 6 places, and the third sees what both before it left: the newest first."""
    twins = pair(tmp_path, {"kind": kind, "queue": 6}, STILL)
    before = torch.empty(0, 32, dtype=torch.float64)
    for step in range(3):
        batch, inputs = masked_batch(seed=10 * step)
        ours, theirs = (means(x) for x in look_at_both(twins, **inputs))
        z, t = projected(twins, ours, torch.cat((theirs, before)))
        g, mine = z @ t.T / 0.2, torch.eye(ROWS, len(t))
        if kind == "codir":
            loss = F.cross_entropy(g, torch.arange(ROWS))
        else:
            loss = F.binary_cross_entropy_with_logits(g, mine.double(), reduction="sum") / ROWS
        twins.check(batch, 0.7 * loss, step)
        before = torch.cat((theirs, before))[:6]
        queue = twins.objective.distillation.contrast
        assert int(queue.filled) == len(before)
        torch.testing.assert_close(queue.queue[: len(before)], before, rtol=1e-12, atol=1e-13)
        twins.student.zero_grad()
        twins.leaves.clear()


def test_a_run_goes_on_with_its_queue(tmp_path):
    """All of a run's state in another process's model: the next step is the same to the bit."""
    first, second = (pair(tmp_path / name, {"queue": 6}) for name in ("a", "b"))
    for step in range(2):
        first.step(masked_batch(seed=10 * step)[0], step)
    kept = {name: x.clone() for name, x in first.engine.state().tensors.items()}
    assert {f"distillation.contrast.{name}" for name in ("queue", "filled", "project.weight")} <= kept.keys()
    for name, x in second.engine.state().tensors.items():
        x.copy_(kept[name])
    (a, found), (b, again) = (twins.step(masked_batch(seed=20)[0], 2) for twins in (first, second))
    assert a.loss == b.loss
    assert all(torch.equal(found[name], again[name]) for name in found)
    after = (twins.engine.state().tensors for twins in (first, second))
    assert all(torch.equal(x, y) for x, y in zip(*(state.values() for state in after), strict=True))


def test_a_queue_forgets_the_oldest():
    contrast = Contrastive(Contrast(weight=1.0, queue=5, width=3), 4, 2)
    rows = torch.arange(24.0).view(12, 2)
    for start in range(0, 12, 3):
        contrast(torch.randn(3, 4), rows[start : start + 3], torch.arange(3))
        contrast.remember()
    assert torch.equal(contrast.queue, rows[[9, 10, 11, 6, 7]])
    contrast.remember()  # without a batch, as after a step that had no contrast
    assert torch.equal(contrast.queue, rows[[9, 10, 11, 6, 7]])


# -- rows ------------------------------------------------------------------------------------------------------


def rows_by_hand(p, q, taken, seen, temperature):
    """InfoNCE of rows of maps [B, H, S, S]: a sample, a head and a row at a time."""
    total = 0
    for b, rows in enumerate(seen):
        counted = [i for i in taken if rows[i]]
        each = []
        for h in range(q.shape[1]):
            for place, i in enumerate(counted):
                similar = [F.cosine_similarity(q[b, h, i], p[b, h, j], dim=0) / temperature for j in counted]
                each.append(F.cross_entropy(torch.stack(similar), torch.tensor(place)))
        total = total + torch.stack(each).mean() * rows.sum()
    return total / seen.sum()


@pytest.mark.parametrize("count", [5, 32])
def test_rows_of_maps_are_told_from_others(count, tmp_path):
    """Each of three heads against the mean of two of six; padding is no row and no key."""
    distill = {"task": 0.0, "rows": {"weight": 1.0, "count": count, "temperature": 0.3}}
    twins = Twins(make("bert"), make("bert", 1, layers=3, heads=6), tmp_path, distill)
    batch, inputs = masked_batch()
    ours, theirs = look_at_both(twins, **inputs)
    taken = [i * LENGTH // 5 for i in range(5)] if count == 5 else range(LENGTH)
    p = theirs.maps[2].unflatten(1, (3, 2)).mean(2)
    twins.check(batch, rows_by_hand(p, ours.maps[1], taken, SEEN, 0.3))


def test_rows_of_causal_maps_are_told_from_others(tmp_path):
    distill = {"task": 0.0, "rows": {"weight": 1.0, "count": 4, "layers": [1, 0]}}
    twins = Twins(make("gpt2"), make("gpt2", 1), tmp_path, distill)
    ours, theirs = look_at_both(twins, words())
    seen = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    each = [rows_by_hand(theirs.maps[1 - i], ours.maps[i], [0, 3, 6, 9], seen, 0.1) for i in range(2)]
    twins.check(numbered({"tokens": words(), "labels": words(seed=1)}), torch.stack(each).mean())
