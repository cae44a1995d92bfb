"""Attention of all families: causal maps of GPT-2, three kinds of maps of T5, documents, heads that differ, patches."""

import pytest
import torch
import torch.nn.functional as F

from headway.pretrain.objectives.distill.names import Target

from .twins import (
    CLASSES,
    LENGTH,
    ROWS,
    TARGET,
    Twins,
    kl,
    kl_of_maps,
    look,
    look_at_both,
    make,
    masked_batch,
    numbered,
    over_rows,
    real,
    words,
)

EVERY = torch.ones(ROWS, LENGTH, dtype=torch.bool)


def mean(values):
    return torch.stack(list(values)).mean()


# -- GPT ---------------------------------------------------------------------------------------------------


def causal(place, distill, student=None, teacher=None, more=None, documents=None):
    shape = {"layers": 4, "hidden": 36} | (teacher or {})
    twins = Twins(make("gpt2", **(student or {})), make("gpt2", 1, **shape), place, distill, more)
    tokens, labels = words(), words(seed=1)
    batch = numbered({"tokens": tokens, "labels": labels})
    ours, theirs = look_at_both(twins, tokens)
    task = twins.job.objective.distill.task * F.cross_entropy(ours.logits.flatten(0, 1), labels.flatten())
    return twins, batch, ours, theirs, task


def test_causal_maps(tmp_path):
    """KL of rows over the keys before them; the states of a pre-norm model are those of the stream."""
    distill = {
        "attention": {"weight": 1.0},
        "states": {"weight": 0.5, "layers": [1, None]},
        "final": {"weight": 0.3},
    }
    twins, batch, ours, theirs, task = causal(tmp_path, distill)
    maps = mean(kl_of_maps(theirs.maps[j], ours.maps[i], EVERY) for i, j in ((0, 1), (1, 3)))
    states = F.mse_loss(twins.linear("model.blocks.0.tap.project", ours.states[1]), theirs.states[2])
    projected = twins.linear(
        "distillation.project", ours.states[-1]
    )  # behind the last norm, as the head reads it
    cosine = (1 - F.cosine_similarity(projected, theirs.states[-1], -1)).mean()
    result = twins.check(batch, task + maps + 0.5 * states + 0.3 * cosine)
    assert result.metrics["learned/attention"] == pytest.approx(maps.item(), rel=1e-11)


def test_states_of_a_last_layer_stand_before_the_last_norm(tmp_path):
    """transformers shows them behind it: so its last block's are taken by a hook."""
    twins = Twins(
        make("gpt2"), make("gpt2", 1), tmp_path, {"task": 0.0, "states": {"weight": 1.0, "layers": "last"}}
    )
    kept = []
    for model in (twins.student, twins.teacher):
        model.transformer.h[-1].register_forward_hook(
            lambda m, i, x: kept.append(x[0] if isinstance(x, tuple) else x)
        )
    ours, theirs = look_at_both(twins, words())
    assert not torch.equal(kept[0], ours.states[-1])
    twins.check(numbered({"tokens": words(), "labels": words(seed=1)}), F.mse_loss(*kept))
    assert theirs.logits.shape == ours.logits.shape


def test_documents_of_a_row_do_not_see_each_other(tmp_path):
    """Rows of packed documents against transformers with a mask of their blocks."""
    documents = (torch.arange(LENGTH) >= torch.tensor([4, 7, 12, 6])[:, None]).int()
    seen = (documents[:, :, None] == documents[:, None]).tril()
    hidden = torch.zeros(ROWS, 1, LENGTH, LENGTH, dtype=torch.float64).masked_fill(~seen[:, None], -1e300)
    more = {"data": {"documents": "isolate"}}
    twins = Twins(make("gpt2"), make("gpt2", 1), tmp_path, {"attention": {"weight": 1.0, "loss": "js"}}, more)
    tokens, labels = words(), words(seed=1)
    ours, theirs = look_at_both(twins, tokens, attention_mask=hidden)
    each = [jensen_shannon(a, b) for a, b in zip(theirs.maps, ours.maps, strict=True)]
    task = F.cross_entropy(ours.logits.flatten(0, 1), labels.flatten())
    twins.check(numbered({"tokens": tokens, "labels": labels, "documents": documents}), task + mean(each))


def test_a_student_that_sees_less_learns_what_its_teacher_thinks_of_that(tmp_path):
    """Of a window of keys: the teacher's weights there, brought to a sum of one."""
    band = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().triu(-4)  # itself and the 4 before it
    more = {"model": {"attention": {"mechanism": "window", "window": 5}}}
    twins = Twins(make("gpt2"), make("gpt2", 1), tmp_path, {"task": 0.0, "attention": {"weight": 1.0}}, more)
    hidden = torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.float64).masked_fill(~band, -1e300)
    ours = look(twins.student, words(), attention_mask=hidden)
    _, theirs = look_at_both(twins, words())
    weights = [p * band / (p * band).sum(-1, keepdim=True) for p in theirs.maps]
    loss = mean(kl_of_maps(p, q, EVERY) for p, q in zip(weights, ours.maps, strict=True))
    twins.check(numbered({"tokens": words(), "labels": words(seed=1)}), loss)


def jensen_shannon(p, q):
    return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)).mean() / 2


# -- heads ---------------------------------------------------------------------------------------------------


def test_heads_of_a_list(tmp_path):
    distill = {"attention": {"weight": 1.0, "heads": [5, 0, 0], "layers": "last"}}
    twins, batch, ours, theirs, task = causal(tmp_path, distill, teacher={"heads": 6})
    picked = theirs.maps[3][:, [5, 0, 0]]
    twins.check(batch, task + kl_of_maps(picked, ours.maps[1], EVERY))


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "mse"])
def test_maps_of_more_heads_are_averaged(kind, tmp_path):
    """Each of three heads learns the mean of its two of six: the mean of maps, not of scores."""
    distill = {"attention": {"weight": 1.0, "layers": "last", "loss": kind}}
    twins, batch, ours, theirs, task = causal(tmp_path, distill, teacher={"heads": 6})
    p, q = theirs.maps[3].unflatten(1, (3, 2)).mean(2), ours.maps[1]
    if kind == "kl":
        loss = kl_of_maps(p, q, EVERY)
    elif kind == "mse":
        loss = ((p - q).square().sum(-1) / torch.arange(1, LENGTH + 1)).mean()
    else:
        loss = kl(q, p).mean()
    twins.check(batch, task + loss)


def test_scores_of_more_heads_are_averaged(tmp_path):
    """TinyBERT's loss has no weights: there it is the scores' mean."""
    distill = {"task": 0.0, "attention": {"weight": 1.0, "layers": "last", "loss": "scores"}}
    twins = Twins(make("bert"), make("bert", 1, heads=6), tmp_path, distill)
    batch, inputs = masked_batch()
    ours, theirs = look_at_both(twins, **inputs)
    seen = real()
    error = (ours.scores(1) - theirs.scores(1).unflatten(1, (3, 2)).mean(2)).square() * seen[:, None, None]
    twins.check(batch, over_rows(error.sum(-1) / seen.sum(-1)[:, None, None], seen))


# -- T5 ------------------------------------------------------------------------------------------------------


def seq2seq(place, distill, **teacher):
    """Twins of T5s; the encoder's rows are padded."""
    more = {"objective": {"name": "pairs"}}
    twins = Twins(make("t5"), make("t5", 1, **teacher), place, distill, more)
    tokens, targets, labels, seen = words(), words(TARGET, 1), words(TARGET, 2), real()
    batch = {"tokens": tokens, "targets": targets, "labels": labels, "documents": seen.int() - 1}
    inputs = {"input_ids": tokens, "attention_mask": seen.long(), "decoder_input_ids": targets}
    ours, theirs = look_at_both(twins, **inputs)
    task = twins.job.objective.distill.task * F.cross_entropy(ours.logits.flatten(0, 1), labels.flatten())
    return twins, numbered(batch), ours.out, theirs.out, task


ASKED = torch.ones(ROWS, TARGET, dtype=torch.bool)


def kl_of_layers(theirs, ours, seen):
    return mean(kl_of_maps(b, a, seen) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("across", [True, False])
def test_maps_of_encoders_decoders_and_between_them(across, tmp_path):
    """With biases by distance. Each tower's mean is over its own rows; cross maps are over keys that are no padding."""
    distill = {"attention": {"weight": 0.7, "across": across}}
    twins, batch, ours, theirs, task = seq2seq(tmp_path, distill, hidden=32, heads=3)
    parts = {
        "attention.0": kl_of_layers(theirs.encoder_attentions, ours.encoder_attentions, real()),
        "attention.1": kl_of_layers(theirs.decoder_attentions, ours.decoder_attentions, ASKED),
        "across.1": kl_of_layers(theirs.cross_attentions, ours.cross_attentions, ASKED),
    }
    if not across:
        del parts["across.1"]
    result = twins.check(batch, task + 0.7 * sum(parts.values()))
    assert {n for n in result.metrics if n.startswith("learned/")} == {f"learned/{n}" for n in parts}
    for name, value in parts.items():
        assert result.metrics[f"learned/{name}"] == pytest.approx(value.item(), rel=1e-10)


def test_states_of_both_towers(tmp_path):
    distill = {"states": {"weight": 0.5, "embeddings": True, "layers": [0, None]}, "final": {"weight": 0.2}}
    twins, batch, ours, theirs, task = seq2seq(tmp_path, distill)
    pairs = [(ours.encoder_hidden_states, theirs.encoder_hidden_states, real())]
    pairs += [(ours.decoder_hidden_states, theirs.decoder_hidden_states, ASKED)]
    states = sum(F.mse_loss(a[1][s], b[1][s]) + F.mse_loss(a[0][s], b[0][s]) for a, b, s in pairs)
    last, target = ours.decoder_hidden_states[-1], theirs.decoder_hidden_states[-1]
    cosine = (1 - F.cosine_similarity(last, target, -1)).mean()
    twins.check(batch, task + 0.5 * states + 0.2 * cosine)


# -- images --------------------------------------------------------------------------------------------------


def images(place, distill, kind="deit", **teacher):
    twins = Twins(make(kind), make(kind, 1, **teacher), place, distill)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(ROWS, 3, 12, 12, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 6, 2, 2])
    ours, theirs = look_at_both(twins, pixels)
    return twins, numbered({"pixels": pixels, "labels": labels}), ours, theirs, labels


def test_deit_learns_hard_labels_and_attention(tmp_path):
    """Equation 3: half of each cross-entropy, of the class token's head and of the distillation token's."""
    logits = {"weight": 0.5, "hard": True}
    distill = {"task": 0.5, "logits": logits, "attention": {"weight": 0.8}}
    twins, batch, ours, theirs, labels = images(tmp_path, distill, layers=4, hidden=30)
    taught = theirs.logits.argmax(1)
    assert not torch.equal(taught, labels)
    hard = F.cross_entropy(ours.out.distillation_logits, taught)
    seen = torch.ones(ROWS, 11, dtype=torch.bool)
    maps = mean(kl_of_maps(theirs.maps[j], ours.maps[i], seen) for i, j in ((0, 1), (1, 3)))
    loss = 0.5 * F.cross_entropy(ours.out.cls_logits, labels) + 0.5 * hard + 0.8 * maps
    held_out = twins.engine.evaluate(batch)  # both heads answer together, and labels count alone
    assert held_out["loss"][0] / ROWS == pytest.approx(F.cross_entropy(ours.logits, labels).item(), rel=1e-11)
    result = twins.check(batch, loss)
    assert result.metrics["soft_loss"] == pytest.approx(hard.item(), rel=1e-11)


def test_a_vit_learns_soft_labels_and_states(tmp_path):
    """Without the distillation token, one head has both losses; all patches count in the last layer too."""
    logits = {"weight": 0.6, "temperature": 3.0}
    distill = {"task": 0.4, "logits": logits, "states": {"weight": 0.5}, "final": {"weight": 0.1}}
    twins, batch, ours, theirs, labels = images(tmp_path, distill, "vit", layers=2)
    soft = F.kl_div(
        *(F.log_softmax(x.logits / 3, -1) for x in (ours, theirs)), reduction="batchmean", log_target=True
    )
    pairs = list(zip(ours.states[1:], theirs.states[1:], strict=True))
    states = mean(F.mse_loss(a, b) for a, b in pairs)
    norms = [
        model.vit.layernorm(x.states[-1]) for model, x in ((twins.student, ours), (twins.teacher, theirs))
    ]
    cosine = (1 - F.cosine_similarity(norms[0], norms[1].detach(), -1)).mean()
    loss = 0.4 * F.cross_entropy(ours.logits, labels) + 0.6 * 9 * soft + 0.5 * states + 0.1 * cosine
    twins.check(batch, loss)
    assert theirs.logits.shape == (ROWS, CLASSES)


def test_patches_relate_to_each_other(tmp_path):
    distill = {"task": 0.0, "relations": {"weight": 1.0, "of": ["keys"], "heads": 2}}
    twins, batch, ours, theirs, _ = images(tmp_path, distill, "vit", hidden=32, heads=4)
    maps = []
    for x in (ours, theirs):
        k = x.k[-1].transpose(1, 2).flatten(2).unflatten(2, (2, -1)).transpose(1, 2)
        maps.append((k @ k.mT / k.shape[-1] ** 0.5).softmax(-1))
    twins.check(batch, kl_of_maps(maps[1], maps[0], torch.ones(ROWS, 10, dtype=torch.bool)))


# -- what is asked -----------------------------------------------------------------------------------------------


def test_a_teacher_is_asked_for_no_more_than_is_learned(tmp_path):
    distill = {
        "attention": {"weight": 1.0, "layers": [None, 2]},
        "relations": {"weight": 1.0, "of": ["keys"]},
    }
    twins, batch, *_ = causal(tmp_path, distill)
    asked = {Target(0, 2, "q"), Target(0, 2, "k"), Target(0, 2, "bias"), Target(0, 3, "keys")}
    assert set(twins.objective.distillation.wanted(0).targets) == asked
    (found,) = twins.engine.teacher.teach([batch], 0)
    assert found.keys() == {t.name for t in asked if t.what != "bias"}  # GPT-2 has none
