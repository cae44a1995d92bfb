"""Rules of attention mechanisms: what is refused, and that errors name the way out."""

import pytest

from headway.kernels.attention.registry import words
from headway.pretrain.config import Job
from headway.pretrain.errors import JobError
from headway.pretrain.inert import inert
from headway.pretrain.recipe import resolve


def job(**model):
    attention = model.pop("attention")
    other = {key: model.pop(key) for key in ("data", "objective", "parallel") if key in model}
    return Job.model_validate({"model": {**model, "attention": attention}, **other})


def refused(match, **facts):
    with pytest.raises(JobError, match=match) as e:
        job(**facts)
    return e.value


def test_every_word_is_taken_by_some_family():
    for name, row in words().items():
        family = "vit" if "images" in row.supports else "gpt" if "causal" in row.supports else "bert"
        objective = {"gpt": "causal", "bert": "masked", "vit": "classify"}[family]
        job(family=family, attention={"mechanism": name}, objective={"name": objective})


def test_unknown_words_name_the_nearest():
    assert refused("'windw' is none of", attention={"mechanism": "windw"}).nearest == "window"
    assert (
        refused("'snk' is none of", attention={"pattern": ["dense", "window+snk"]}).nearest == "window+sink"
    )
    refused("of each kind one word", attention={"mechanism": "window+local"})
    refused("of each kind one word", attention={"mechanism": "sink+sink"})


def test_patterns_repeat():
    attention = job(layers=4, attention={"pattern": ["window", "window", "dense"]}).model.attention
    assert [attention.of_layer(i) for i in range(4)] == ["window", "window", "dense", "window"]
    assert attention.mechanisms == ("window", "dense")


def test_models_are_refused_that_a_mechanism_does_not_suit():
    refused("several documents", attention={"mechanism": "bigbird"}, data={"documents": "isolate"})
    refused("drops weights", attention={"mechanism": "differential", "dropout": 0.1})
    refused("entropy", attention={"mechanism": "sparsemax", "entropy_penalty": 0.1})
    refused("has the kernels reference, blocks", attention={"mechanism": "sparsemax", "kernel": "sdpa"})


def test_choices_that_learn_by_the_loss_are_refused_where_it_is_not_told():
    for family, objective in (
        ("t5", {"name": "spans"}),
        ("t5", {"name": "prefix"}),
        ("vit", {"name": "mae"}),
        ("bert", {"name": "masked", "masking": {"pairs": "next"}}),
    ):
        facts = {"family": family, "objective": objective, "attention": {"mechanism": "window+reinforce"}}
        facts |= {"t5": {"positions": "relative"}, "bert": {"segments": 2}}.get(family, {})
        error = refused("does not tell", **facts)
        assert (error.field, error.nearest) == ("model.attention.mechanism", "window+hard")
    refused("balances experts", experts={"count": 4}, attention={"pattern": ["dense", "reinforce"]})
    refused("drops weights", attention={"mechanism": "reinforce", "dropout": 0.1})
    refused("entropy of weights", attention={"pattern": ["dense", "reinforce"], "entropy_penalty": 0.1})
    refused("has the kernels reference, blocks", attention={"mechanism": "reinforce", "kernel": "sdpa"})
    refused("one product of queries and keys", attention={"mechanism": "additive+reinforce"})
    job(family="gpt", objective={"name": "prefix"}, attention={"mechanism": "reinforce"})


def test_settings_that_no_word_reads_have_no_effect():
    idle = inert(resolve(["gpt/tiny"], ["model.attention.window=64", "model.attention.mechanism=bigbird"]))
    assert "no mechanism of the model reads it" in idle["model.attention.window"]
    assert not inert(resolve(["gpt/tiny"], ["model.attention.window=64", "model.attention.mechanism=window"]))
    both = ["model.attention.pattern=[window]", "model.attention.mechanism=bigbird"]
    assert "pattern" in inert(resolve(["gpt/tiny"], both))["model.attention.mechanism"]
