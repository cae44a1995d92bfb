"""The published methods on BERT, each composed of transformers' outputs as its authors do: loss and all gradients.

Rows are padded; what padding has is left out of every mean.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from headway.launch.teacher import begin_with
from headway.pretrain.errors import JobError
from headway.tests import oracles

from .twins import Twins, kl_of_maps, look_at_both, make, masked_batch, over_rows, real

TASK = 0.5
SEEN = real()


def pair(place, distill, teacher=None, student=None):
    """Twins of BERTs (the teacher with four layers), a batch, and what both see; the task's cross-entropy."""
    shape = {"layers": 4, "hidden": 32, "heads": 4} | (teacher or {})
    twins = Twins(make("bert", **(student or {})), make("bert", 1, **shape), place, {"task": TASK} | distill)
    batch, inputs = masked_batch()
    ours, theirs = look_at_both(twins, **inputs)
    chosen = batch["labels"] != -100
    task = TASK * F.cross_entropy(ours.logits[chosen], batch["labels"][chosen])
    return twins, batch, ours, theirs, task


# -- DistilBERT ------------------------------------------------------------------------------------------------

DISTILBERT = {"logits": {"weight": 5.0, "temperature": 2.0}, "final": {"weight": 1.0}}


def distilbert(batch, ours, theirs):
    """As the authors' `distiller.py` composes soft targets (`restrict_ce_to_mask`: at the places that have a label) and
    cosines, with its weights of 5 and 1."""
    chosen = batch["labels"] != -100
    log_q, p = F.log_softmax(ours.logits[chosen] / 2, -1), F.softmax(theirs.logits[chosen] / 2, -1)
    return 5 * nn.KLDivLoss(reduction="batchmean")(log_q, p) * 2**2, cosine_of_states(ours, theirs)


def cosine_of_states(ours, theirs):
    x, y = ours.states[-1][SEEN], theirs.states[-1][SEEN]
    return nn.CosineEmbeddingLoss(reduction="mean")(x, y, torch.ones(len(x)))


def test_distilbert(tmp_path):
    twins, batch, ours, theirs, task = pair(tmp_path, DISTILBERT, {"hidden": 24, "heads": 3})
    soft, cosine = distilbert(batch, ours, theirs)
    result = twins.check(batch, task + soft + cosine)
    assert result.metrics["learned/final"] == pytest.approx(cosine.item(), rel=1e-11)
    assert "distillation.project.weight" not in dict(twins.objective.named_parameters())


def test_distilbert_of_another_width(tmp_path):
    """Projected states, and TextBrewer's cosine of them."""
    twins, batch, ours, theirs, task = pair(tmp_path, {"final": {"weight": 1.0}})
    x = twins.linear("distillation.project", ours.states[-1])
    twins.check(batch, task + oracles.textbrewer().cos_loss(x[SEEN], theirs.states[-1][SEEN]))


@pytest.mark.parametrize(("how", "layers"), [("uniform", (1, 3)), ("top", (2, 3)), ([0, 2], (0, 2))])
def test_a_student_begins_with_layers_of_its_teacher(how, layers, tmp_path):
    """DistilBERT takes one layer of two. All other weights are the teacher's too."""
    twins, *_ = pair(tmp_path, DISTILBERT | {"init": how}, {"hidden": 24, "heads": 3})
    named = dict(twins.objective.named_parameters())
    begin_with(twins.source, twins.job, {n: p for n, p in named.items() if n.startswith(("model.", "head."))})
    theirs, checked = twins.teacher.state_dict(), 0
    for name, x in dict(twins.folder.tensors()).items():
        other = next(link.theirs[0] for link in twins.folder.family.links(twins.job) if name in link.ours)
        parts = other.split(".")
        if "layer" in parts:
            at = parts.index("layer") + 1
            parts[at] = str(layers[int(parts[at])])
        assert torch.equal(named[name], theirs[".".join(parts)]), name
        assert not torch.equal(named[name], x)
        checked += 1
    assert checked == len(twins.folder.source.names)


def test_a_student_of_another_width_cannot_begin_with_its_teacher(tmp_path):
    twins, *_ = pair(tmp_path, DISTILBERT | {"init": "uniform"})
    weights = {n: p for n, p in twins.objective.named_parameters() if n.startswith("model.")}
    with pytest.raises(JobError, match=r"objective\.distill\.init = 'uniform': .*widths must agree"):
        begin_with(twins.source, twins.job, weights)


# -- TinyBERT --------------------------------------------------------------------------------------------------


def hidden_losses(twins, ours, theirs, layers):
    """TextBrewer's, of embeddings and of hidden states through projections (equations 8, 9); means over layers."""
    hid_mse = oracles.textbrewer().hid_mse_loss
    first = twins.linear("model.blocks.0.tap.project_inputs", ours.states[0])
    states = [
        hid_mse(twins.linear(f"model.blocks.{i}.tap.project", ours.states[i + 1]), theirs.states[j + 1], SEEN)
        for i, j in enumerate(layers)
    ]
    return hid_mse(first, theirs.states[0], SEEN) + torch.stack(states).mean()


def score_loss(ours, theirs, layers):
    """Mean squared error of scores before the softmax (equation 7), over keys that are seen, heads and rows.

    TextBrewer's `att_mse_loss` with a mask is a mean over all pairs of places, where this is one over rows of means
    over keys: in a batch with padding, short samples have less weight there.
    """
    each = []
    for i, j in enumerate(layers):
        error = F.mse_loss(ours.scores(i), theirs.scores(j), reduction="none") * SEEN[:, None, None]
        each.append(over_rows(error.sum(-1) / SEEN.sum(-1)[:, None, None], SEEN))
    return torch.stack(each).mean()


TINYBERT = {
    "attention": {"weight": 1.0, "loss": "scores"},
    "states": {"weight": 0.8, "embeddings": True},
}


@pytest.mark.parametrize(
    ("how", "layers"), [("uniform", (1, 3)), ("top", (2, 3)), ("bottom", (0, 1)), ([3, 1], (3, 1))]
)
def test_tinybert(how, layers, tmp_path):
    twins, batch, ours, theirs, task = pair(tmp_path, TINYBERT | {"layers": how}, {"heads": 3, "hidden": 30})
    attention, hidden = score_loss(ours, theirs, layers), hidden_losses(twins, ours, theirs, layers)
    result = twins.check(batch, task + attention + 0.8 * hidden)
    assert result.metrics["learned/attention"] == pytest.approx(attention.item(), rel=1e-11)


def test_tinyberts_scores_are_textbrewers_of_rows_without_padding(tmp_path):
    """Without a mask TextBrewer puts 0 for every score below -1e-3; with one of ones it compares them all."""
    twins = Twins(make("bert"), make("bert", 1), tmp_path, {"task": 0.0, "attention": TINYBERT["attention"]})
    batch, inputs = masked_batch(padded=False)
    ours, theirs = look_at_both(twins, **inputs)
    att_mse, ones = oracles.textbrewer().att_mse_loss, torch.ones(4, 12)
    each = [att_mse(ours.scores(i), theirs.scores(i), ones) for i in range(2)]
    twins.check(batch, torch.stack(each).mean())


def test_tinybert_projects_states_of_equal_widths_where_it_is_asked(tmp_path):
    states = {"weight": 1.0, "embeddings": True, "projection": "always"}
    twins, batch, ours, theirs, task = pair(tmp_path, {"states": states}, {"hidden": 24, "heads": 3})
    twins.check(batch, task + hidden_losses(twins, ours, theirs, (1, 3)))


def test_tinybert_maps_of_weights(tmp_path):
    """The other reading of section 3.2: weights, over the keys that are seen."""
    distill = {"attention": {"weight": 1.0, "loss": "mse", "layers": "top"}}
    twins, batch, ours, theirs, task = pair(tmp_path, distill, {"heads": 3, "hidden": 30})
    each = [
        over_rows((ours.maps[i] - theirs.maps[i + 2]).square().sum(-1) / SEEN.sum(-1)[:, None, None], SEEN)
        for i in range(2)
    ]
    twins.check(batch, task + torch.stack(each).mean())


# -- MobileBERT ------------------------------------------------------------------------------------------------


def test_mobilebert(tmp_path):
    """Feature maps: layer-normalised states (equation 2); attention: KL head by head (equation 3)."""
    distill = {"task": TASK, "states": {"weight": 0.6, "loss": "normalised"}, "attention": {"weight": 0.9}}
    wide = {"intra_bottleneck_size": 36, "layers": 2}  # as IB-BERT, its teacher
    twins = Twins(make("mobilebert"), make("mobilebert", 1, **wide), tmp_path, distill)
    batch, inputs = masked_batch()
    ours, theirs = look_at_both(twins, **inputs)
    chosen = batch["labels"] != -100
    task = TASK * F.cross_entropy(ours.logits[chosen], batch["labels"][chosen])
    features = [
        (F.layer_norm(a, (24,)) - F.layer_norm(b, (24,))).square().mean(-1)[SEEN].mean()
        for a, b in zip(ours.states[1:], theirs.states[1:], strict=True)
    ]
    maps = [kl_of_maps(b, a, SEEN) for a, b in zip(ours.maps, theirs.maps, strict=True)]
    result = twins.check(batch, task + 0.6 * torch.stack(features).mean() + 0.9 * torch.stack(maps).mean())
    assert result.metrics["learned/states"] == pytest.approx(torch.stack(features).mean().item(), rel=1e-11)


# -- MiniLM ----------------------------------------------------------------------------------------------------


def relation(a, heads):
    """softmax(A A^T / sqrt(d)) over the keys that are seen, of features cut anew: what torch's own attention gives
    when the values are the unit matrix."""
    a = a.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)
    unit = torch.eye(a.shape[2], dtype=a.dtype).expand(*a.shape[:2], -1, -1)
    return F.scaled_dot_product_attention(a, a, unit, SEEN[:, None, None])


def relations(ours, theirs, of, heads, layer=1, source=3):
    picked = [(getattr(ours, x)[layer], getattr(theirs, x)[source]) for x in of]
    return torch.stack([kl_of_maps(relation(b, heads), relation(a, heads), SEEN) for a, b in picked]).mean()


def test_minilm(tmp_path):
    """Last layers' maps, and relations of values; widths differ, heads do not (section 3.1, 3.2)."""
    distill = {"attention": {"weight": 1.0, "layers": "last"}, "relations": {"weight": 1.0}}
    twins, batch, ours, theirs, task = pair(tmp_path, distill, {"heads": 3, "hidden": 42})
    maps = kl_of_maps(theirs.maps[3], ours.maps[1], SEEN)
    values = relations(ours, theirs, "v", 3)
    result = twins.check(batch, task + maps + values)
    assert result.metrics["learned/relations"] == pytest.approx(values.item(), rel=1e-11)


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_minilm_of_any_number_of_relation_heads(heads, tmp_path):
    """MiniLMv2: neither the student's 3 heads nor the teacher's 4."""
    distill = {"relations": {"weight": 0.7, "of": ["queries", "keys", "values"], "heads": heads}}
    twins, batch, ours, theirs, task = pair(tmp_path, distill)
    twins.check(batch, task + 0.7 * relations(ours, theirs, "qkv", heads))


def test_minilm_of_an_upper_layer(tmp_path):
    """The last layer but one, of large teachers (section 4.2 of v2)."""
    distill = {"relations": {"weight": 1.0, "heads": 4, "layers": [None, 2]}}
    twins, batch, ours, theirs, task = pair(tmp_path, distill)
    twins.check(batch, task + relations(ours, theirs, "v", 4, source=2))


# -- other teachers, other losses ------------------------------------------------------------------------------


def test_a_teacher_whose_layers_share_weights(tmp_path):
    """ALBERT: a block that is used four times shows what it is asked of each use."""
    distill = {"task": 0.0, "attention": {"weight": 1.0, "layers": [0, 2]}, "relations": {"weight": 1.0}}
    twins = Twins(make("bert"), make("albert", 1, layers=4, hidden=30), tmp_path, distill)
    batch, inputs = masked_batch()
    ours, theirs = look_at_both(twins, **inputs)
    maps = [kl_of_maps(theirs.maps[j], ours.maps[i], SEEN) for i, j in enumerate((0, 2))]
    assert not torch.equal(theirs.maps[0], theirs.maps[2])
    twins.check(batch, torch.stack(maps).mean() + relations(ours, theirs, "v", 3))


def test_the_weight_of_the_objectives_own_loss_is_of_all_its_parts(tmp_path):
    """Of next-sentence prediction too."""
    more = {"objective": {"masking": {"pairs": "next"}}}
    twins = Twins(
        make("bert_pairs"), make("bert", 1), tmp_path, {"task": 0.3, "final": {"weight": 1.0}}, more
    )
    batch, inputs = masked_batch()
    batch["pair"] = torch.tensor([0, 1, 1, 0])
    ours, theirs = look_at_both(twins, **inputs)
    chosen = batch["labels"] != -100
    words = F.cross_entropy(ours.out.prediction_logits[chosen], batch["labels"][chosen])
    pairs = F.cross_entropy(ours.out.seq_relationship_logits, batch["pair"])
    twins.check(batch, 0.3 * (words + pairs) + cosine_of_states(ours, theirs))
