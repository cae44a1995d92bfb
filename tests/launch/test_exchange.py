"""Models to Hugging Face and back by command: a run that was exported, a folder that training starts from."""

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from headway.launch import companions, run
from headway.launch.cli import app
from headway.launch.exchange import imported_weights
from headway.launch.start_from import fill, find_checkpoint
from headway.parallel.checkpoint.load import load
from headway.parallel.checkpoint.manifest import read_manifest
from headway.pretrain.engine import State
from headway.pretrain.errors import CheckpointError, JobError
from headway.pretrain.hf.folder import open_folder
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.objectives import build_objective
from headway.pretrain.recipe import load_job, validate
from headway.pretrain.records.metrics import read_metrics


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


@pytest.fixture(scope="module")
def trained(small_job, tmp_path_factory):
    """A run folder with a checkpoint of step 3."""
    place = tmp_path_factory.mktemp("runs")
    sets = ["train.steps=3", "model.bias=false", "model.kv_heads=1", "optimizer.ema=0.5"]
    run.train([str(small_job)], [f"run.dir={place}", "run.name=small", *sets])
    return place / "small"


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    place = tmp_path_factory.mktemp("hf") / "model"
    call("export", trained, "--to", "hf", place)
    return place


def weights(folder) -> dict[str, torch.Tensor]:
    path = find_checkpoint(str(folder))
    entries = read_manifest(path).tensors
    names = [name for name in entries if name.startswith(("model.", "head."))]
    state = State({name: torch.empty(entries[name].shape) for name in names})
    load(path, state, strict=False)
    return state.tensors


def losses(folder) -> list[float]:
    return [row["loss"] for row in read_metrics(folder)]


def test_an_exported_run_loads_with_its_tokenizer(trained, exported):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, report = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not any(report.values()), report
    tokenizer = AutoTokenizer.from_pretrained(exported)
    text = "the cat sat\n  on é東京."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == list(text.encode())
    assert tokenizer.decode(ids[0]) == text
    assert (tokenizer.eos_token_id, model.config.eos_token_id, len(tokenizer)) == (256, 256, 260)
    ours = build_objective(load_job(trained / "job.yaml").job, Inputs(vocab=260, length=32))
    ours.load_state_dict(weights(trained))
    expected = ours.eval().logits(ids)
    assert (model(ids).logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_export_and_import_give_the_same_bits(trained, exported, tmp_path):
    said = call("checkpoint", "import", "--from", "hf", exported, "--out", tmp_path / "run")
    assert "llama" in said
    assert f"train.start_from={tmp_path / 'run'}" in said.replace("\n", "")
    a, b = weights(trained), weights(tmp_path / "run")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert "whole" in call("checkpoint", "verify", tmp_path / "run")
    job = load_job(tmp_path / "run/job.yaml").job
    assert job.model.kv == 1
    assert job.data.tokenizer.kind == "huggingface"
    call("export", tmp_path / "run", "--to", "hf", tmp_path / "again")
    first, second = ((p / "model.safetensors").read_bytes() for p in (exported, tmp_path / "again"))
    assert first == second
    assert (exported / "tokenizer.json").read_bytes() == (tmp_path / "again/tokenizer.json").read_bytes()


def test_training_starts_from_a_folder_a_run_and_an_imported_run_alike(trained, exported, corpus, tmp_path):
    call("checkpoint", "import", "--from", "hf", exported, "--out", tmp_path / "imported")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"data: {{sources: ['{corpus}'], heldout: 0.2}}\n"
        "train: {steps: 2, global_batch: 8, compile: false}\nprecision: fp32\ntracking: {wandb: off}\n"
    )
    starts = {"hf": exported, "run": trained, "imported": tmp_path / "imported", "fresh": None}
    for name, start in starts.items():
        sets = [
            f"run.dir={tmp_path}",
            f"run.name={name}-2",
            *([f"train.start_from={start}"] if start else []),
        ]
        run.train([str(tmp_path / "imported/job.yaml"), str(recipe)], sets)
    found = {name: losses(tmp_path / f"{name}-2") for name in starts}
    assert found["hf"] == found["run"] == found["imported"]
    assert found["fresh"][0] > found["hf"][0]
    # an imported run is itself a run, at step 0, that goes on in place
    text = (tmp_path / "imported/job.yaml").read_text()
    sets = [f"data.sources=['{corpus}']", "train.steps=2", "train.global_batch=8", "train.compile=false"]
    (tmp_path / "imported/job.yaml").write_text(text.replace("data:\n", "data:\n  heldout: 0.2\n"))
    run.train([str(tmp_path / "imported/job.yaml")], [*sets, "precision=fp32", "tracking.wandb=off"])
    assert losses(tmp_path / "imported") == found["hf"]
    manifest = read_manifest(tmp_path / "imported/checkpoints/step_00000002")
    assert manifest.numbers["step"] == 2


def test_averages_are_exported_where_they_are_asked_for(trained, exported, tmp_path):
    assert "--average" in call("export", trained, tmp_path / "weights")
    call("export", trained, tmp_path / "averages", "--average")
    path = find_checkpoint(str(trained))
    average = {"ema.model.embed.tokens.weight": torch.empty(260, 32)}
    load(path, State(average), strict=False)
    found = dict(open_folder(tmp_path / "averages").tensors())
    assert torch.equal(found["model.embed.tokens.weight"], average["ema.model.embed.tokens.weight"])
    call("checkpoint", "import", exported, "--out", tmp_path / "run")
    with pytest.raises(JobError, match="has no averages"):
        call("export", tmp_path / "run", tmp_path / "none", "--average")


def start(exported, tmp_path, small_job, *sets: str) -> None:
    more = [f"run.dir={tmp_path}", "run.name=new", "train.steps=1", f"train.start_from={exported}"]
    run.train([str(small_job)], [*more, "model.bias=false", "model.kv_heads=1", *sets])


def test_a_model_that_means_something_else_is_refused(exported, tmp_path, small_job):
    with pytest.raises(JobError, match=r"model.rotary_base = 500.0.*Nearest legal choice: 10000"):
        start(exported, tmp_path, small_job, "model.rotary_base=500.0")
    with pytest.raises(JobError, match=r"model.activation = 'geglu'.*swiglu"):
        start(exported, tmp_path, small_job, "model.activation=geglu")


def test_missing_and_extra_tensors_are_named(exported, tmp_path, small_job):
    from safetensors.torch import load_file, save_file

    place = tmp_path / "damaged"
    shutil.copytree(exported, place)
    tensors = load_file(place / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, place / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.blocks.1.mlp.up.weight is missing"):
        start(place, tmp_path, small_job)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(88 * 32 // 32, 32)
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)
    save_file(tensors, place / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no place for model.layers.7.mlp.up_proj.weight"):
        start(place, tmp_path, small_job)


def test_rows_beyond_the_vocabulary_are_cut_and_told(exported, tmp_path, small_job, capsys):
    from safetensors.torch import load_file, save_file

    place = tmp_path / "padded"
    shutil.copytree(exported, place)
    tensors = load_file(place / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat((table, torch.zeros(4, table.shape[1])))
    save_file(tensors, place / "model.safetensors")
    start(place, tmp_path, small_job)
    assert "4 rows beyond the vocabulary are left out" in capsys.readouterr().out
    call("checkpoint", "import", "--from", "hf", place, "--out", tmp_path / "imported")
    start(tmp_path / "imported", tmp_path, small_job, "run.name=other")
    assert losses(tmp_path / "other") == losses(tmp_path / "new")


def test_what_cannot_be_exchanged_says_why(trained, exported, tmp_path):
    with pytest.raises(JobError, match=r"--to = 'onnx'.*Nearest legal choice: hf"):
        call("export", trained, "--to", "onnx", tmp_path / "x")
    with pytest.raises(JobError, match="exists and is not empty"):
        call("export", trained, "--to", "hf", exported)
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        call("export", tmp_path, "--to", "hf", tmp_path / "x")
    with pytest.raises(JobError, match=r"config\.json"):
        call("checkpoint", "import", "--from", "hf", tmp_path)
    assert not (tmp_path / "x").exists()
    (tmp_path / "odd").mkdir()
    config = json.loads((exported / "config.json").read_text())
    shutil.copy(exported / "model.safetensors", tmp_path / "odd")
    for change, message in (
        ({"model_type": "mamba"}, r"model_type = 'mamba': Headway knows gpt2, llama"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rotary positions of whole heads, of the kinds",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}},
            "rope_parameters.factor.*must say it",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta_fast": 8}},
            "rope_parameters.beta_fast",
        ),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'.*Nearest legal choice: silu"),
    ):
        (tmp_path / "odd/config.json").write_text(json.dumps(config | change))
        with pytest.raises(JobError, match=message):
            open_folder(tmp_path / "odd")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"positions": "rotary", "activation": "relu2", "norm": "rmsnorm"},
            "model.activation = 'relu2'.*swiglu",
        ),
        ({"positions": "learned", "bias": False}, "model.bias = False.*Nearest legal choice: True"),
        ({"positions": "learned", "kv_heads": 4}, "model.kv_heads = 4.*Nearest legal choice: 12"),
        ({"positions": "learned", "spectral": True}, "model.spectral = True"),
    ],
)
def test_a_model_that_hugging_face_lacks_names_the_setting(model, message):
    from headway.pretrain.hf import family_of_job

    job = validate({"model": model})
    with pytest.raises(JobError, match=message):
        family_of_job(job).to_hf(job, Inputs(vocab=9, length=1024))


def test_images_are_normalised_as_the_job_says():
    job = validate({"data": {"images": {"size": 32, "channels": 3, "mean": [0.4], "std": [0.2]}}})
    found = companions.preprocessor(job.data.images)
    assert found["image_mean"] == [0.4] * 3
    assert found["size"] == {"height": 32, "width": 32}


def vision(classes: int, name: str = "classify", distill_token: bool = False):
    shape = {
        "family": "vit",
        "layers": 1,
        "hidden": 12,
        "heads": 3,
        "positions": "sinusoidal",
        "vision": {"patch": 4, "distill_token": distill_token},
    }
    objective = {"name": name, "mae": {"layers": 1, "hidden": 8, "heads": 2}}
    job = validate({"model": shape, "data": {"images": {"size": 8}}, "objective": objective})
    return job, dict(build_objective(job, Inputs(image=8, channels=3, classes=classes)).named_parameters())


@torch.no_grad()
def test_a_classifier_begins_with_the_encoder_of_mae_and_a_head_of_its_own():
    _, source = vision(0, "mae")
    job, target = vision(5)
    head = target["head.weight"].clone()
    notes = fill(target, source.items(), "there", job)
    assert torch.equal(target["model.embed.patches.weight"], source["model.embed.patches.weight"])
    assert torch.equal(target["head.weight"], head)
    assert any("head.weight is not there" in note for note in notes)
    assert any("decoder.embed.weight is not in the model" in note for note in notes)
    _, other = vision(7)
    notes = fill(target, other.items(), "there", job)
    assert any("head.weight has 7 rows for 5 classes" in note for note in notes)


@torch.no_grad()
def test_a_distilled_classifier_takes_both_heads_or_begins_them_anew():
    job, target = vision(5, distill_token=True)
    begun = target["head_distill.weight"].clone()
    _, same = vision(5, distill_token=True)
    same = {name: weight + 1 for name, weight in same.items()}
    assert fill(dict(target), same.items(), "there", job) == []
    assert torch.equal(target["head_distill.weight"], same["head_distill.weight"])
    assert torch.equal(target["model.embed.distill_token"], same["model.embed.distill_token"])
    job, target = vision(5, distill_token=True)
    _, other = vision(7, distill_token=True)
    notes = fill(target, other.items(), "there", job)
    assert any("head_distill.weight has 7 rows for 5 classes" in note for note in notes)
    assert torch.equal(target["head_distill.weight"], begun)
    _, plain = vision(5)
    with pytest.raises(CheckpointError, match=r"model\.embed\.distill_token is missing"):
        fill(target, plain.items(), "there", job)


BARE = {
    "hidden_size": 24, "intermediate_size": 50, "num_hidden_layers": 1, "num_attention_heads": 3,
    "image_size": 12, "patch_size": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "left"),
    [
        ("ViTModel", set()),
        ("DeiTModel", set()),
        ("DeiTForImageClassification", {"classifier.bias", "classifier.weight"}),
    ],
)
def test_an_encoder_without_our_heads_is_read_and_begins_them_with_no_classes(kind, left, tmp_path):
    import transformers as hf

    settings = hf.ViTConfig(**BARE) if kind == "ViTModel" else hf.DeiTConfig(**BARE)
    more = {} if "For" in kind else {"add_pooling_layer": False}
    getattr(hf, kind)(settings, **more).save_pretrained(tmp_path)
    folder = open_folder(tmp_path)
    assert set(folder.left_over()) == left
    found, notes = imported_weights(folder, folder.job)
    assert found["head.weight"].shape == (0, 24)
    assert ("head_distill.weight" in found) == (kind != "ViTModel")
    assert any("head.weight" in note for note in notes)


@pytest.mark.parametrize("command", [["checkpoint", "import"], ["export"]])
def test_commands_have_help(command):
    assert "Usage" in call(*command, "--help")
