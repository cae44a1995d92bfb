"""The small recipes of every family, shortened, as a user starts them: they train, resume, score and report."""

import json
from pathlib import Path

import pytest

from headway.launch import run
from headway.pretrain.errors import DataError
from headway.pretrain.records.metrics import read_metrics
from headway.pretrain.records.records import read_events
from headway.tests.chosen import first

SHORT = ["train.steps=4", "train.compile=false", "precision=fp32", "train.eval_every=2", "train.eval_rows=8",
         "train.global_batch=4", "schedule.warmup=1", "checkpoint.every=2", "tracking.wandb=off"]  # fmt: skip
SMALL = ["model.layers=2", "model.hidden=32", "model.heads=2"]
TEXT = ["data.seq_len=32", "data.heldout=0.2", "data.tokenizer={kind: bytes}"]
RECIPES = {
    "bert/tiny": ("accuracy", ["this model", "the commonest token"], TEXT),
    "t5/tiny": ("held-out loss", ["this model", "untrained"], [*TEXT, "model.decoder_layers=2"]),
    "moe/tiny": ("bits per byte", ["this model", "zlib -9", "xz -9"], [*TEXT, "model.ffn=64"]),
    "vit/tiny": ("accuracy", ["this model", "logistic regression"], []),
    "vit/mae_tiny": ("reconstruction error", ["this model", "mean image", "mean patch"], []),
}


def start(name: str, corpus: Path, folder: Path, *more: str) -> Path:
    _, _, sets = RECIPES[name]
    sources = [f"data.sources=['{corpus}']"] if TEXT[0] in sets else []
    if "moe" in name:
        sets = [*sets, "model.experts={count: 4, top_k: 2, ffn: 32, pattern: DE}"]
    run.train([name], [*SHORT, *SMALL, *sets, *sources, f"run.dir={folder}", "run.name=run", *more])
    return folder / "run"


@pytest.mark.parametrize("name", RECIPES)
def test_a_small_recipe_trains_scores_and_reports(name, corpus, tmp_path, capsys):
    folder = start(name, corpus, tmp_path)
    title, names, _ = RECIPES[name]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["score"]["title"] == title
    assert [entry for entry, _ in summary["score"]["entries"]] == names
    assert all(value == value for _, value in summary["score"]["entries"])  # none is NaN
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert "heldout_loss" in rows[1]
    page = (folder / "report.html").read_text()
    assert title.capitalize() in page
    assert ("Reconstruction" in page) is (name == "vit/mae_tiny")
    assert title in capsys.readouterr().out
    if name == "moe/tiny":
        load = rows[-1]["load/1"]
        assert len(load) == 4
        # Two experts for each of a row's tokens, but for what does not fit.
        assert sum(load) + rows[-1]["dropped/1"] == pytest.approx(2 * 32)
        assert {"balance", "router_z", "dropped/1", "router_entropy/1"} <= rows[-1].keys()


@pytest.mark.parametrize("name", first(1, ["moe/tiny", "bert/tiny", "vit/mae_tiny"]))
def test_an_interrupted_run_draws_the_same_bits(name, corpus, tmp_path):
    straight = start(name, corpus, tmp_path / "straight")
    start(name, corpus, tmp_path / "parts", "train.steps=2", "schedule.steps=4")
    resumed = start(name, corpus, tmp_path / "parts", "schedule.steps=4")
    losses = [[row["loss"] for row in read_metrics(folder)] for folder in (straight, resumed)]
    assert losses[0] == losses[1]


def test_broken_images_are_left_out_counted_and_named(tmp_path, capsys):
    from PIL import Image

    for i in range(12):
        folder = tmp_path / "images" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 20 * i).save(folder / f"{i}.png")
    (tmp_path / "images/class0/torn.png").write_bytes((tmp_path / "images/class0/0.png").read_bytes()[:40])
    sets = [*SHORT, *SMALL, f"data.sources=['{tmp_path / 'images'}']", f"run.dir={tmp_path}", "run.name=run"]
    with pytest.raises(DataError, match=r"torn\.png.*data\.on_error=skip"):
        run.train(["vit/tiny"], [*sets, "data.heldout=0.0"])
    run.train(["vit/tiny"], [*sets, "data.heldout=0.0", "data.on_error=skip"], fresh=True)
    (warning,) = (event["message"] for event in read_events(tmp_path / "run") if event["kind"] == "warning")
    assert "left out 1 broken images" in warning
    assert "torn.png" in warning
