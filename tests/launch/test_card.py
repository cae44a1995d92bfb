"""Model cards and data sheets: what Hugging Face reads of them, and that they tell what the records hold, no more."""

import json
import os
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from typer.testing import CliRunner

from headway.launch import run
from headway.launch.cli import app
from headway.parallel.checkpoint.manifest import read_manifest
from headway.pretrain.data.stream import SampleStream
from headway.pretrain.errors import JobError
from headway.pretrain.records.metrics import read_metrics
from headway.pretrain.records.records import read_events
from headway.tests.launch.test_families import RECIPES, start


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def read(run_dir: Path, *more: object) -> tuple[ModelCard, str]:
    """A run's card as the hub reads it, and the sheet."""
    call("card", run_dir, *more)
    folder = Path(str(more[1])) if more else run_dir
    return ModelCard.load(folder / "MODEL_CARD.md"), (folder / "DATA_SHEET.md").read_text()


def whole(text: str) -> bool:
    """No value of Python's came through, and no table has a row of another width."""
    assert not re.search(r"\bNone\b|\bnan\b|Undefined|\{\{|\{%", text)
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        lines = block.splitlines()
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1, block
        assert re.fullmatch(r"(\|-+)+\|", lines[1].replace(" ", "")), block
    return True


@pytest.fixture(scope="module")
def folder(small_job, tmp_path_factory):
    """A finished run with energy by stated watts."""
    place = tmp_path_factory.mktemp("runs")
    sets = ["tracking.energy.source=tdp", "tracking.energy.watts=50", "tracking.energy.grid=SE"]
    run.train([str(small_job)], [f"run.dir={place}", "run.name=small", *sets])
    return place / "small"


def test_the_hub_reads_what_the_records_hold(folder):
    card, sheet = read(folder)
    assert whole(card.content)
    assert whole(sheet)
    told, summary = card.data, json.loads((folder / "summary.json").read_text())
    assert (told.library_name, told.pipeline_tag) == ("headway", "text-generation")
    assert told.tags == ["headway", "gpt", "causal"]
    assert told.license is None
    assert told.datasets is None
    measured = {result.metric_type: result.metric_value for result in told.eval_results}
    assert measured["loss"] == pytest.approx(summary["heldout_loss"])
    assert measured["bits_per_byte"] == pytest.approx(summary["bits_per_byte"])
    assert all(r.dataset_name == "text.jsonl (held out)" for r in told.eval_results)
    co2 = told.co2_eq_emissions
    assert co2["emissions"] == pytest.approx(1000 * summary["energy"]["kg_co2e"], rel=1e-3)
    assert "estimate: 50 W" in co2["source"]
    assert co2["geographical_location"] == "Sweden"
    assert co2["training_type"] == "pre-training"
    machine = next(e for e in read_events(folder) if e["kind"] == "start")
    assert co2["hardware_used"] == f"1 x {machine['device']}"
    again = ModelCard(str(card))  # what the library writes of it, it reads again
    assert again.data.to_dict() == told.to_dict()


def test_the_card_and_the_sheet_hold_the_records(folder, corpus):
    card, sheet = read(folder)
    summary = json.loads((folder / "summary.json").read_text())
    manifest = read_manifest(folder / "checkpoints/step_00000020")
    assert f"{summary['parameters']:,}" in card.text
    assert manifest.created in card.text
    assert f"| bits per byte | {summary['bits_per_byte']:.4f} |" in card.text
    for name, value in summary["score"]["entries"]:
        assert f"| {name} | {value:.4f} |" in card.text
    assert "| steps | 20 of 20 |" in card.text
    assert "An estimate, at least in part" in card.text
    assert "| `optimizer.lr` | `0.003` |" in card.text
    assert card.text.count("**To be written**") == 3  # announced once, and two sections
    assert "not final weights" not in card.text
    data = next(e for e in read_events(folder) if e["kind"] == "data")
    source = data["sources"][0]
    assert source["train"]["documents"] + source["heldout"]["documents"] == 200
    for side in ("train", "heldout"):
        for key in ("documents", "tokens", "bytes"):
            assert f"{source[side][key]:,}" in sheet
    assert source["fingerprint"] in sheet
    assert data["tokenizer"]["digest"] in sheet
    assert "every sample was used exactly once an epoch" in sheet
    text = sum(len(json.loads(line)["text"]) for line in corpus.read_text().splitlines())
    assert source["train"]["bytes"] + source["heldout"]["bytes"] == text


def test_no_folder_of_this_machine_is_published(folder, corpus):
    card, sheet = read(folder)
    for text in (card.content, sheet):
        assert str(corpus.parent) not in text
        assert str(folder.parent) not in text
        assert not re.search(
            rf"\b{re.escape(os.uname().nodename)}\b", text
        )  # a host may be called vm, as in nvme


def test_the_curve_lies_beside_it(folder, tmp_path):
    card, _ = read(folder, "--out", tmp_path / "cards")
    assert "](loss.png)" in card.text
    picture = tmp_path / "cards" / "loss.png"
    assert picture.stat().st_size < 60_000
    with Image.open(picture) as image:
        assert image.size == (720, 280)


def test_an_export_carries_the_card_of_its_checkpoint(folder, tmp_path):
    call("export", folder, tmp_path / "new")
    card = ModelCard.load(tmp_path / "new" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.eval_results
    assert (tmp_path / "new" / "DATA_SHEET.md").exists()
    call("export", folder / "checkpoints/step_00000015", tmp_path / "old")
    old = ModelCard.load(tmp_path / "old" / "README.md")
    assert not old.data.eval_results
    assert "These are not final weights" in old.text
    assert "| steps | 15 of 20 |" in old.text
    assert f"| tokens | {sum(r['tokens'] for r in read_metrics(folder)[:15]):,} |" in old.text


def test_numbers_of_averages_are_not_those_of_the_weights(small_job, tmp_path):
    run.train([str(small_job)], [f"run.dir={tmp_path}", "run.name=run", "train.steps=3", "optimizer.ema=0.5"])
    card, _ = read(tmp_path / "run")
    assert "Measurements are of the averages of the weights" in card.text
    call("export", tmp_path / "run", tmp_path / "weights")
    call("export", tmp_path / "run", tmp_path / "averages", "--average")
    plain, averages = (ModelCard.load(tmp_path / name / "README.md") for name in ("weights", "averages"))
    assert averages.data.eval_results
    assert not plain.data.eval_results
    assert "its numbers are not theirs" in plain.text


def test_an_unfinished_run(small_job, tmp_path, monkeypatch):
    """Killed after step 7: no summary, no end, weights of step 5."""
    draw, calls = SampleStream.batch, []

    def die(*args, **kwargs):
        calls.append(args)
        if len(calls) > 9:
            raise KeyboardInterrupt
        return draw(*args, **kwargs)

    monkeypatch.setattr(SampleStream, "batch", die)
    with pytest.raises(KeyboardInterrupt):
        run.train([str(small_job)], [f"run.dir={tmp_path}", "run.name=run", "tracking.energy.source=off"])
    assert not (tmp_path / "run/summary.json").exists()
    card, sheet = read(tmp_path / "run")
    assert whole(card.content)
    assert whole(sheet)
    assert "These are not final weights.** They stand at step 5 of 20" in card.text
    assert not card.data.eval_results
    assert "co2_eq_emissions" not in card.data.to_dict()
    assert "Not counted" in card.text
    assert "No measurement of these weights" in card.text


def test_an_imported_run_that_was_never_trained(folder, tmp_path):
    call("export", folder, tmp_path / "hf")
    call("checkpoint", "import", tmp_path / "hf", "--out", tmp_path / "imported")
    card, sheet = read(tmp_path / "imported")
    assert whole(card.content)
    assert whole(sheet)
    assert "No training is recorded here.** The weights were imported from `hf`" in card.text
    assert "Counts of the sources are not recorded" in sheet
    assert "which samples it used is not recorded" in sheet
    assert "](loss.png)" not in card.text


def test_training_goes_on_from_what_was_imported(folder, small_job, corpus, tmp_path):
    call("export", folder, tmp_path / "hf")
    call("checkpoint", "import", tmp_path / "hf", "--out", tmp_path / "imported")
    sets = [f"data.sources=['{corpus}']", "train.steps=2", "train.global_batch=8", "train.compile=false"]
    recipe = tmp_path / "imported/job.yaml"
    recipe.write_text(recipe.read_text().replace("data:\n", "data:\n  heldout: 0.2\n"))
    sets += ["precision=fp32", "tracking.wandb=off", "checkpoint.keep_last=1"]
    run.train([str(recipe)], sets)
    card, _ = read(tmp_path / "imported")
    assert "imported from `hf`" in card.text
    assert card.data.co2_eq_emissions["training_type"] == "continued pre-training"


def test_a_student_names_its_teacher(folder, small_job, tmp_path):
    sets = ["model.layers=1", "train.steps=2", f"objective.distill.teacher={folder}"]
    sets += ["objective.distill.logits.weight=0.5", "schedule.warmup=1"]
    run.train([str(small_job)], [f"run.dir={tmp_path}", "run.name=run", *sets])
    card, sheet = read(tmp_path / "run")
    assert whole(card.content)
    assert "distillation" in card.data.tags
    assert "The teacher is `.../small`" in card.text
    assert "| logits | 0.5 |" in card.text
    assert "The teacher's own data is not recorded here" in sheet


@pytest.mark.matrix
@pytest.mark.parametrize("name", RECIPES)
def test_every_family(name, corpus, tmp_path):
    folder = start(name, corpus, tmp_path)
    card, sheet = read(folder)
    assert whole(card.content)
    assert whole(sheet)
    assert card.data.eval_results
    assert card.data.tags[1] == name.split("/")[0].replace("moe", "gpt")
    if "moe" in name:
        assert "mixture-of-experts" in card.data.tags
        assert "| experts | 4, of which a token uses 2 |" in card.text
    if "vit" in name:
        assert "images to train on" in sheet


def test_what_is_no_run_is_said(tmp_path):
    with pytest.raises(JobError, match="is no run folder"):
        call("card", tmp_path)
