"""Recipes: merging, origins, and errors that name field, value, rule and the nearest legal choice."""

import pytest

from headway.pretrain import inert, recipe
from headway.pretrain.config import Job
from headway.pretrain.errors import HeadwayError, JobError


def write(path, text):
    path.write_text(text)
    return str(path)


def test_later_recipes_win_and_the_command_line_comes_last(tmp_path):
    base = write(tmp_path / "base.yaml", "model: {layers: 2, heads: 4}\ntrain: {steps: 10, seed: 1}\n")
    over = write(tmp_path / "over.yaml", "train: {steps: 20}\n")
    resolved = recipe.resolve([base, over], ["train.seed=7"])
    assert resolved.job.model.layers == 2
    assert (resolved.job.train.steps, resolved.job.train.seed) == (20, 7)
    assert resolved.origins["train.steps"] == over
    assert resolved.origins["train.seed"] == recipe.COMMAND_LINE
    assert "data.seq_len" not in resolved.origins


def test_run_is_named_after_the_recipe(tmp_path):
    assert recipe.resolve(["gpt/tiny"]).job.run.name == "gpt-tiny"
    assert recipe.resolve([write(tmp_path / "My run.yaml", "")]).job.run.name == "My-run"
    assert recipe.resolve(["gpt/tiny"], ["run.name=x"]).job.run.name == "x"


@pytest.mark.parametrize("name", sorted(recipe.shipped_recipes()))
def test_every_shipped_recipe_is_a_job_and_names_its_schema(name):
    path = recipe.find_recipe(name)
    recipe.resolve([name])
    first = path.read_text().splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    assert (path.parent / first.partition("=")[2]).resolve().is_file()


def test_dumped_job_loads_again_with_its_origins(tmp_path):
    sets = [
        "optimizer.betas=[0.8, 0.9]",
        "data.sources=['a b.jsonl', {path: c, weight: 2}]",
        "optimizer.lr=3e-4",
    ]
    resolved = recipe.resolve(["gpt/tiny"], [*sets, "tracking.prompt='# from: here\n'"])
    path = tmp_path / "job.yaml"
    path.write_text(recipe.dump(resolved))
    again = recipe.load_job(path)
    assert again.job == resolved.job
    assert again.origins["optimizer.betas"] == recipe.COMMAND_LINE
    assert again.origins["checkpoint.every"] in (recipe.DEFAULT, "gpt/tiny")
    assert recipe.resolve([str(path)]).job == resolved.job


@pytest.mark.parametrize(
    ("setting", "field", "nearest"),
    [
        ("model.layer=3", "model.layer", "model.layers"),
        ("model.norm=layernom", "model.norm", "layernorm"),
        ("model.heads=7", "model.heads", 8),
        ("model.kv_heads=3", "model.kv_heads", 2),
        ("train.steps=0", "train.steps", 1),
        ("train.steps=abc", "train.steps", None),
        ("train.steps=1.5", "train.steps", None),
        ("model.tied=1", "model.tied", None),
        ("optimizer.lr=fast", "optimizer.lr", None),
        ("model=3", "model", None),
        ("schedule.warmup=100000", "schedule.warmup", None),
        ("data.tokenizer.vocab=3", "data.tokenizer.vocab", 260),
    ],
)
def test_a_wrong_setting_is_named(setting, field, nearest):
    with pytest.raises(JobError) as caught:
        recipe.resolve(["gpt/tiny"], [setting])
    assert caught.value.field == field
    assert caught.value.exit_code == 2
    assert field in str(caught.value)
    if nearest is not None:
        assert caught.value.nearest == nearest


def test_several_wrong_settings_come_together():
    with pytest.raises(HeadwayError) as caught:
        recipe.resolve(["gpt/tiny"], ["model.norm=x", "train.steps=y"])
    assert "model.norm" in str(caught.value)
    assert "train.steps" in str(caught.value)
    assert caught.value.exit_code == 2


def test_sequences_must_fit_the_position_table():
    sets = ["model.positions=learned", "model.max_positions=128", "data.seq_len=256"]
    with pytest.raises(JobError, match=r"data.seq_len = 256: .*model.max_positions = 128.*choice: 128"):
        recipe.resolve(["gpt/tiny"], sets)


def test_yaml_is_safe_strict_and_of_version_1_2(tmp_path):
    assert recipe.parse_yaml("[3e-4, 1.5, .5, -2, 1.0e-05, off, no, true]", "x") == [
        3e-4, 1.5, 0.5, -2, 1e-5, "off", "no", True
    ]  # fmt: skip
    with pytest.raises(JobError, match=r"bad.yaml:2.*twice"):
        recipe.resolve([write(tmp_path / "bad.yaml", "train: {}\ntrain: {}\n")])
    with pytest.raises(JobError, match="not valid YAML"):
        recipe.resolve([write(tmp_path / "evil.yaml", "run: !!python/object/apply:os.system ['true']\n")])
    with pytest.raises(JobError, match="mapping"):
        recipe.resolve([write(tmp_path / "list.yaml", "- a\n")])
    with pytest.raises(JobError, match="Nearest legal choice: gpt/tiny"):
        recipe.resolve(["gpt/tinny"])
    with pytest.raises(JobError, match=r"form a\.b=c"):
        recipe.resolve(["gpt/tiny"], ["train.steps"])


def test_settings_without_effect_are_flagged_and_refused_on_the_command_line():
    resolved = recipe.resolve(["gpt/tiny"], ["schedule.name=constant", "schedule.decay=0.3"])
    assert "schedule.decay" in inert.inert(resolved)
    with pytest.raises(JobError, match=r"schedule\.decay.*no effect"):
        inert.refuse_inert(resolved)
    inert.refuse_inert(recipe.resolve(["gpt/tiny"]))


LAID_OUT = {  # a setting without effect: what gives it one
    "parallel.sequence=false": "parallel.tensor=2",
    "parallel.context_method=ulysses": "parallel.context=-1",
    "parallel.check_every=5": "parallel.replicate=2",
    "parallel.schedule=gpipe": "parallel.pipeline=2",
    "parallel.reshard=false": "parallel.context=2",
    "parallel.expert=1": "model.experts.count=4",
}


@pytest.mark.parametrize("setting", LAID_OUT)
def test_settings_of_axes_that_are_not_there_have_no_effect(setting):
    field, needed = setting.partition("=")[0], LAID_OUT[setting]
    idle = recipe.resolve(["gpt/tiny"], ["parallel.shard=1", setting])
    with pytest.raises(JobError, match=rf"{field}.*has no effect"):
        inert.refuse_inert(idle)
    inert.refuse_inert(recipe.resolve(["gpt/tiny"], ["parallel.shard=1", needed, setting]))


ROTARY, SCALING = "model.positions=rotary", "model.rotary_scaling"
LINEAR, YARN = f"{SCALING}.kind=linear", [f"{SCALING}.kind=yarn", f"{SCALING}.original_length=64"]


@pytest.mark.parametrize(("setting", "idle", "needed"), [
    (LINEAR, ["model.positions=alibi"], [ROTARY]),
    (f"{SCALING}.factor=2", [ROTARY], [ROTARY, LINEAR]),
    (f"{SCALING}.original_length=64", [ROTARY, LINEAR], [ROTARY, *YARN]),
    (f"{SCALING}.fast=16", [ROTARY, LINEAR], [ROTARY, *YARN]),
    (f"{SCALING}.attention_factor=1.1", [ROTARY, LINEAR], [ROTARY, *YARN]),
    ("model.attention.qk_norm=true", ["model.attention.mechanism=gat", "model.positions=learned"],
     ["model.attention.mechanism=dense"]),
])  # fmt: skip
def test_settings_of_other_positions_and_mechanisms_have_no_effect(setting, idle, needed):
    field = setting.partition("=")[0]
    with pytest.raises(JobError, match=rf"{field}.*has no effect"):
        inert.refuse_inert(recipe.resolve(["gpt/tiny"], [*idle, setting]))
    inert.refuse_inert(recipe.resolve(["gpt/tiny"], [*needed, setting]))


D = "objective.distill"
TAUGHT = [f"{D}.teacher=runs/large", f"{D}.logits.weight=1"]
CACHED = [f"{D}.cache=kept", f"{D}.logits.weight=1"]
DISTILLED = [  # a setting, what leaves it without effect, what gives it one
    (f"{D}.task=0.5", [], TAUGHT),
    (f"{D}.logits.temperature=2", [], TAUGHT),
    ("parallel.teacher.tensor=2", CACHED, TAUGHT),
    (f"{D}.precision=bf16", CACHED, TAUGHT),
    (f"{D}.layers=top", [*TAUGHT, f"{D}.relations.weight=1"], [*TAUGHT, f"{D}.attention.weight=1"]),
    (f"{D}.attention.loss=js", TAUGHT, [*TAUGHT, f"{D}.attention.weight=1"]),
    (f"{D}.attention.heads=[0,0,1,1]", TAUGHT, [*TAUGHT, f"{D}.rows.weight=1"]),
    (f"{D}.states.begin=3", TAUGHT, [*TAUGHT, f"{D}.states.weight=1"]),
    (f"{D}.contrast.queue=8", TAUGHT, [*TAUGHT, f"{D}.contrast.weight=1"]),
]


@pytest.mark.parametrize(("setting", "idle", "needed"), DISTILLED)
def test_settings_of_what_is_not_learned_have_no_effect(setting, idle, needed):
    field = setting.partition("=")[0]
    with pytest.raises(JobError, match=rf"{field}.*has no effect"):
        inert.refuse_inert(recipe.resolve(["gpt/tiny"], [*idle, setting]))
    inert.refuse_inert(recipe.resolve(["gpt/tiny"], [*needed, setting]))


HARD = f"{D}.logits.hard=true"


@pytest.mark.parametrize(("name", "more", "setting"), [
    ("gpt/tiny", f"{D}.attention.weight=1", f"{D}.attention.across=false"),
    ("vit/tiny", f"{D}.logits.weight=2", f"{D}.logits.top_k=3"),
    ("vit/tiny", HARD, f"{D}.logits.temperature=2.0"),
    ("vit/tiny", HARD, f"{D}.logits.divergence=js"),
])  # fmt: skip
def test_settings_of_other_families_and_labels_have_no_effect(name, more, setting):
    with pytest.raises(JobError, match=rf"{setting.partition('=')[0]}.*has no effect"):
        inert.refuse_inert(recipe.resolve([name], [*TAUGHT, more, setting]))


def test_a_pipeline_keeps_what_it_gathers():
    sets = ["parallel.pipeline=2", "parallel.shard=2", "parallel.reshard=false"]
    with pytest.raises(JobError, match="in a pipeline gathered parameters stay"):
        inert.refuse_inert(recipe.resolve(["gpt/tiny"], sets))


def test_inert_rules_name_real_settings_and_defaults_are_never_flagged():
    known = dict(recipe.leaves(Job()))
    for field, _, _ in inert.RULES:
        assert field in known or any(name.startswith(field) for name in known if field.endswith(".")), field
    assert inert.inert(recipe.Resolved(Job(), {})) == {}
