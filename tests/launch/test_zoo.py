"""`headway attention zoo` by the real trainer, on a small job of two steps."""

import json

import pytest

from headway.kernels.attention.registry import mechanism, words
from headway.launch import zoo
from headway.launch.signals import StopRequest
from headway.pretrain.errors import Interrupted

QUICK = ("train.steps=2", "schedule.steps=2", "schedule.warmup=1", "checkpoint.every=1")


@pytest.fixture
def small(small_job, tmp_path, monkeypatch):
    """The name of a recipe that trains in a second, in a folder of its own."""
    monkeypatch.chdir(small_job.parent)
    monkeypatch.setattr(zoo, "COMMON", QUICK)
    monkeypatch.setattr(zoo, "RECIPES", {small_job.name: ()})
    return small_job.name


def test_what_suits_is_trained_and_the_rest_is_told(small, tmp_path, capsys):
    names = ["dense", "window", "linformer", "bigbird+entmax15"]
    zoo.zoo([small], names, str(tmp_path / "zoo"))
    results = json.loads((tmp_path / "zoo" / "zoo.json").read_text())
    assert [r["word"] for r in results] == names
    trained = {r["word"]: r for r in results if r["reason"] is None}
    assert set(trained) == {"dense", "window", "bigbird+entmax15"}
    assert all(r["heldout_loss"] > 0 and r["step_seconds"] > 0 for r in trained.values())
    assert "causal" in next(r["reason"] for r in results if r["word"] == "linformer")
    assert (tmp_path / "zoo" / "zoo.png").stat().st_size > 0
    assert not (tmp_path / "zoo" / f"{small}-linformer").exists()
    job = (tmp_path / "zoo" / f"{small}-window" / "job.yaml").read_text()
    assert "window: 64" in job
    assert "held-out loss" in capsys.readouterr().out


def test_it_goes_on_where_it_stopped(small, tmp_path):
    zoo.zoo([small], ["dense"], str(tmp_path / "zoo"))
    metrics = tmp_path / "zoo" / f"{small}-dense" / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    zoo.zoo([small], ["dense", "temperature"], str(tmp_path / "zoo"))
    assert metrics.stat().st_mtime_ns == before  # a whole run is not trained again
    assert len(json.loads((tmp_path / "zoo" / "zoo.json").read_text())) == 2


def test_a_signal_after_the_last_step_stops_it_too(small, tmp_path, monkeypatch):
    """While a run writes its report nobody asks whether to stop: the next run must not begin."""
    asked = StopRequest()
    asked.asked = True
    monkeypatch.setattr(zoo, "StopRequest", lambda: asked)
    zoo_run = zoo.run.train

    def finished(recipes, sets, *, stop):
        stop.asked = False
        zoo_run(recipes, sets, stop=stop)
        stop.asked = True

    monkeypatch.setattr(zoo.run, "train", finished)
    with pytest.raises(Interrupted, match="start it again"):
        zoo.zoo([small], ["dense", "window"], str(tmp_path / "zoo"))
    assert not (tmp_path / "zoo" / f"{small}-window").exists()


@pytest.mark.parametrize("word", zoo.SIZES)
def test_sizes_are_settings_of_their_words(word):
    assert set(zoo.SIZES[word]) <= set(mechanism(word).settings)


def test_every_mechanism_is_in_a_recipe():
    found = {word for _, word in zoo.pairs(list(zoo.RECIPES), list(words()))}
    assert found == set(words())
