"""Choices learn by the score function: against the gradient of the expected loss, by all choices that can be made."""

import math
from itertools import product

import pytest
import torch

from headway.kernels.attention.draw import Draw
from headway.kernels.attention.masks import lower
from headway.pretrain.config import Job
from headway.pretrain.data.specials import Specials
from headway.pretrain.models.attention import Core
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.layers import Noise
from headway.pretrain.objectives import base, build_objective, choices

VOCAB = 7
NOISE = Noise.at(0, 0, torch.tensor([0]))


def objective_of(heads=1, layers=2, family="gpt", name="causal", more=None, **data):
    tree = {
        "model": {"family": family, "layers": layers, "hidden": 8, "heads": heads,
                  "attention": {"mechanism": "reinforce", "kernel": "reference"},
                  "init": {"std": 0.5, "scheme": "normal"},
                  **(more or {})},
        "objective": {"name": name, "masking": {"pairs": "none"}} if family == "bert" else {"name": name},
        "data": {"seq_len": 3, "tokenizer": {"kind": "bytes"}, **data},
        "precision": "fp64",
    }  # fmt: skip
    inputs = Inputs(vocab=VOCAB, length=data.get("seq_len", 3), image=4, channels=1, classes=3)
    made = build_objective(Job.model_validate(tree), inputs, Specials(VOCAB, 0, VOCAB, {}, []))
    for key, value in made.named_parameters():
        if "baseline" in key:  # whatever it is
            value.data.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(key))))
    return made


TEXT = {
    "tokens": torch.tensor([[3, 1, 4]]),
    "labels": torch.tensor([[1, -100, 2]]),
    "slot": torch.tensor([0]),
}
PICTURE = {
    "pixels": torch.linspace(-1, 2, 16, dtype=torch.float64).view(1, 1, 4, 4),
    "labels": torch.tensor([2]),
    "slot": torch.tensor([0]),
}


class Told:
    """Makes every layer choose what it is told, and computes the log-probability of that by torch's distribution."""

    def __init__(self, monkeypatch):
        self.choices, self.log_probability, drawn = [], 0.0, Core.drawn

        def gumbel(_, rows, heads, queries, keys):
            chosen = self.choices.pop(0)[:, :, queries]
            return 1e6 * torch.nn.functional.one_hot(chosen, len(keys)).double()

        def record(core, q, k, v, mask, bias=None, own=None):
            logits = q @ k.mT / math.sqrt(q.shape[-1])
            seen = lower(mask, q.shape[2], k.shape[2], q.device)
            logits = logits if seen is None else logits.masked_fill(~seen, -torch.inf)
            chosen = self.choices[0][:, :, : q.shape[2]]
            self.log_probability += torch.distributions.Categorical(logits=logits).log_prob(chosen).sum()
            return drawn(core, q, k, v, mask, bias, own)

        monkeypatch.setattr(Draw, "gumbel", gumbel)
        monkeypatch.setattr(Core, "drawn", record)

    def run(self, objective, batch, told):
        """The summed loss and the probability of what was told."""
        self.choices, self.log_probability = list(told), 0.0
        terms = objective(batch, NOISE).terms
        assert not self.choices
        return torch.stack(list(terms.values())).sum(), self.log_probability.exp()


def every_choice(keys, heads, layers):
    """All that layers and heads can choose, [1, H, S] a layer; `keys`: how many each place sees, from the first on."""
    one = list(product(*map(range, keys)))  # of a head
    for each in product(one, repeat=heads * layers):
        yield torch.tensor(each).view(layers, 1, heads, len(keys))


def gradients(objective, loss):
    found = torch.autograd.grad(loss, list(objective.parameters()), allow_unused=True)
    flat = {
        key: torch.zeros_like(p) if g is None else g
        for (key, p), g in zip(objective.named_parameters(), found, strict=True)
    }
    return {key: g.clone() for key, g in flat.items() if "baseline" not in key}


def expected(told, objective, batch, space, monkeypatch):
    """The gradient of sum_c p(c) loss(c)."""
    total = 0.0
    with monkeypatch.context() as patch:
        patch.setattr(base.Objective, "add_choices", lambda *_: None)
        for each in space:
            loss, p = told.run(objective, batch, each)
            total = total + loss * p
    return gradients(objective, total)


def estimated(told, objective, batch, space):
    """Mean of the estimate, and the variance of that of queries and keys, summed over their elements."""
    mean, square, mass = {}, 0.0, 0.0
    for each in space:
        loss, p = told.run(objective, batch, each)
        p = p.detach()
        mass += float(p)
        for key, g in gradients(objective, loss).items():
            mean[key] = mean.get(key, 0) + p * g
            if ".q." in key or ".k." in key:
                square += float(p * g.square().sum())
    assert mass == pytest.approx(1, abs=1e-12)
    mine = [g for key, g in mean.items() if ".q." in key or ".k." in key]
    return mean, square - sum(float(g.square().sum()) for g in mine)


BERT = {"family": "bert", "name": "masked"}
SHORT = {key: value[:, :2] if value.dim() > 1 else value for key, value in TEXT.items()}
PREFIX = TEXT | {"labels": torch.tensor([[-100, 5, 2]]), "prefix": torch.tensor([2])}
VIT = {
    "family": "vit",
    "name": "classify",
    "more": {"vision": {"patch": 4}},
    "images": {"size": 4, "channels": 1, "mean": [0.5], "std": [0.5]},
}
CASES = {
    "gpt": ({}, TEXT, (1, 2, 3)),
    "two heads": ({"heads": 2, "layers": 1}, TEXT, (1, 2, 3)),
    "a block used twice": ({"more": {"unique_layers": 1}}, TEXT, (1, 2, 3)),
    "prefix": ({"name": "prefix"}, PREFIX, (2, 2, 3)),
    "bert": (BERT | {"layers": 1}, TEXT, (3, 3, 3)),
    "bert, two layers": (BERT, SHORT, (2, 2)),
    "vit": (VIT, PICTURE, (2, 2)),
}  # fmt: skip


def case_of(name):
    settings, batch, keys = CASES[name]
    objective = objective_of(**settings)
    if name == "vit":
        objective.outputs = None  # or the last block would ask for the class token alone
    return objective, batch, list(every_choice(keys, settings.get("heads", 1), settings.get("layers", 2)))


@pytest.mark.parametrize("case", CASES)
def test_the_mean_estimate_is_the_gradient_of_the_expected_loss(case, monkeypatch):
    (objective, batch, space), told = case_of(case), Told(monkeypatch)
    truth = expected(told, objective, batch, space, monkeypatch)
    assert any(g.abs().max() > 1e-4 for key, g in truth.items() if ".q." in key)
    mean, _ = estimated(told, objective, batch, space)
    for key, g in truth.items():
        torch.testing.assert_close(mean[key], g, rtol=1e-10, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}")


def without_baseline(objective):
    objective.level = 0.0
    for key, value in objective.named_parameters():
        if "baseline" in key:
            value.data.zero_()
    return objective


def foreseeing(objective, batch):
    """The objective with baselines that have learned while nothing else did."""
    baselines = [p for key, p in objective.named_parameters() if "baseline" in key]
    optimizer = torch.optim.Adam(baselines, 0.05)
    for step in range(200):
        optimizer.zero_grad()
        objective(batch, Noise.at(0, step, batch["slot"])).terms["rows"].sum().backward()
        optimizer.step()
    return objective


def test_a_baseline_changes_the_variance_and_not_the_mean(monkeypatch):
    objective, batch, space = case_of("gpt")
    bare, level = (without_baseline(case_of("gpt")[0]) for _ in range(2))
    level.level = math.log(VOCAB)  # the loss of an untrained model is near it
    kinds, told = (bare, level, foreseeing(objective, batch)), Told(monkeypatch)
    found = [estimated(told, kind, batch, space) for kind in kinds]
    for mean, _ in found[1:]:
        for key, g in found[0][0].items():
            torch.testing.assert_close(mean[key], g, rtol=1e-9, atol=1e-11)
    variances = [variance for _, variance in found]
    assert variances[0] > 1.2 * variances[1], variances
    assert variances[1] > 1.2 * variances[2], variances


def test_what_a_choice_cannot_change_is_noise(monkeypatch):
    (objective, batch, space), told = case_of("gpt"), Told(monkeypatch)
    mean, variance = estimated(told, objective, batch, space)
    for name in ("here", "onward"):
        monkeypatch.setattr(choices, name, choices.whole)
    blunt, more = estimated(told, objective, batch, space)
    for key, g in mean.items():
        torch.testing.assert_close(blunt[key], g, rtol=1e-9, atol=1e-11)
    assert more > 1.2 * variance


def test_how_far_choices_reach():
    loss = torch.tensor([[3.0, 0.0, 2.0, 1.0]])
    scored = loss > 0
    assert [x.tolist() for x in choices.here(loss, scored)] == [[[3, 0, 2, 1]], [[1, 0, 1, 1]]]
    assert [x.tolist() for x in choices.onward(loss, scored)] == [[[6, 3, 3, 1]], [[3, 2, 2, 1]]]
    assert [x.tolist() for x in choices.whole(loss, scored)] == [[[6]], [[3]]]


def test_the_loss_is_told_as_it_is_and_baselines_learn_apart():
    objective, batch, _ = case_of("gpt")
    out = objective(batch, NOISE)
    assert out.terms["rows"].item() == 0
    logits = torch.nn.functional.linear(
        objective.model(batch["tokens"], noise=NOISE).final, objective.head_weight
    )
    loss = torch.nn.functional.cross_entropy(
        logits[0], batch["labels"][0], ignore_index=-100, reduction="sum"
    )
    assert out.terms["tokens"].item() == pytest.approx(loss.item(), rel=1e-12)
    assert float(out.metrics["baseline_error"].sum) > 0
    assert "log_chosen/0" not in out.metrics
    parameters = dict(objective.named_parameters())
    baselines = {key for key in parameters if "baseline" in key}
    for term, heard in (("rows", baselines), ("tokens", parameters.keys() - baselines)):
        found = torch.autograd.grad(out.terms[term], list(parameters.values()), allow_unused=True)
        assert {key for key, g in zip(parameters, found, strict=True) if g is not None} == heard
    assert "rows" not in objective(batch).terms  # nothing is drawn in evaluation


def trained(steps=50):
    """Losses of training on rows of random tokens, the last of which must be the first again; and the share of rows
    whose last place looks at the first one."""
    more = {"init": {"scheme": "normal", "std": 0.1}, "hidden": 32, "attention": {"mechanism": "reinforce"}}
    objective, rows = without_baseline(objective_of(layers=1, more=more, seq_len=4)), 256
    objective.level = math.log(VOCAB)
    optimizer, losses = torch.optim.AdamW(objective.parameters(), 0.01, (0.9, 0.95)), []
    for step in range(steps):
        tokens = torch.randint(1, VOCAB, (rows, 4), generator=torch.Generator().manual_seed(step))
        tokens[:, -1] = 0
        labels = torch.full_like(tokens, -100)
        labels[:, -1] = tokens[:, 0]
        noise = Noise.at(0, step, torch.arange(rows))
        terms = objective({"tokens": tokens, "labels": labels}, noise).terms
        optimizer.zero_grad()
        (torch.stack(list(terms.values())).sum() / rows).backward()
        optimizer.step()
        losses.append(terms["tokens"].item() / rows)
    weights = objective.attention_maps({"tokens": tokens})
    return losses, (weights[0, :, 0, -1].argmax(-1) == 0).double().mean()


def test_training_learns_which_key_to_choose(monkeypatch):
    losses, right = trained()
    assert losses[0] > 1.9
    assert max(losses[-5:]) < 0.1
    assert right > 0.99
    monkeypatch.setattr(base.Objective, "add_choices", lambda *_: None)
    losses, _ = trained()
    # Scores stay as they were: a place is drawn one time in four, and of the other tokens nothing is known.
    assert min(losses[-5:]) > 0.75 * math.log(6) - 0.2
