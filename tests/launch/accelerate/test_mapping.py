"""The tables of Accelerate's keys are complete, and say what they should."""

import inspect
import json
import re
from dataclasses import MISSING
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.config.default import write_basic_config
from accelerate.utils import launch as launchers

from headway.launch import settings
from headway.launch.accelerate import mapping
from headway.launch.accelerate.asks import translate
from headway.launch.accelerate.environment import launched, read_variables
from headway.launch.accelerate.file import SECTIONS
from headway.launch.accelerate.job import resolve_asked
from headway.pretrain.recipe import dump
from headway.tests.launch.accelerate.told import ALONE, FOUR, TWO, settings_of, variables


def test_every_key_of_a_file_has_a_rule():
    keys = {name for name in ClusterConfig.__dataclass_fields__ if name not in SECTIONS}
    assert keys <= mapping.RULES.keys()
    assert SECTIONS.keys() == {n for n in ClusterConfig.__dataclass_fields__ if n.endswith("_config")}


def test_every_answer_to_accelerate_config_has_a_rule():
    from accelerate.commands.config import cluster

    text = inspect.getsource(cluster.get_cluster_input)
    found = re.findall(r'\b(\w+_config)\[(?:prefix \+ )?"(\w+)"\]', text)
    assert len(found) > 60
    for section, key in found:
        name = f"{SECTIONS[section]}.{key.removeprefix(SECTIONS[section] + '_')}"
        assert mapping.ALIASES.get(name, name) in mapping.RULES, key


EVERY_SECTION = [
    "--cpu --num_processes 1",
    "--multi_gpu --num_processes 2",
    "--use_fsdp --num_processes 2",
    "--use_megatron_lm --num_processes 2",
    "--use_deepspeed --num_processes 2",
    "--use_fsdp --fsdp_version 2 --use_parallelism_config --num_processes 2",
]


@pytest.mark.parametrize("options", EVERY_SECTION)
def test_what_nobody_asked_for_yields(options):
    """Of a launch without further options only the kind was asked for: all else are Accelerate's defaults."""
    told = variables(options)
    assert launched(told)
    asked = [row.key for row in translate(read_variables(told)) if row.asked and row.settings]
    assert asked == [
        k for k in told if k.startswith("ACCELERATE_USE_") and k in asked and told[k] in ("true", "True")
    ]


def test_every_variable_of_the_launcher_has_a_rule():
    """Also those that are set only on request: read from the launcher's own lines."""
    text = inspect.getsource(launchers)
    names = set(re.findall(r'current_env\["((?:ACCELERATE|FSDP)_\w+)"\]', text))
    for prefix, function in (
        ("MEGATRON_LM_", launchers.prepare_multi_gpu_env),
        ("PARALLELISM_CONFIG_", launchers.prepare_extend_env_parallelism_config),
    ):
        names |= {
            prefix + each
            for each in re.findall(r'current_env\[prefix \+ "(\w+)"\]', inspect.getsource(function))
        }
    assert len(names) > 70
    for given in read_variables({**dict.fromkeys(names, "none"), "ACCELERATE_MIXED_PRECISION": "no"}):
        assert mapping.ALIASES.get(given.name, given.name) in mapping.RULES, given.key


def test_settings_are_settings_of_a_job():
    from headway.pretrain.config import Job
    from headway.pretrain.recipe import fields

    known = set(fields(Job))
    for name, rule in mapping.RULES.items():
        named = {s for value in rule.values.values() if not isinstance(value, str) for s in value}
        assert named | {rule.setting} - {""} <= known | {""}, name


ENVIRONMENTS = [
    ("--multi_gpu", {"parallel.replicate": -1, "parallel.shard": 1, "precision": "fp32"}),
    ("--multi_gpu --mixed_precision bf16", {"precision": "bf16"}),
    ("--multi_gpu --dynamo_backend inductor", {"train.compile": True}),
    ("--use_fsdp", {"parallel.engine": "native", "parallel.shard": -1, "parallel.reshard": True}),
    (
        "--use_fsdp --fsdp_sharding_strategy SHARD_GRAD_OP",
        {"parallel.shard": -1, "parallel.replicate": 1, "parallel.reshard": False},
    ),
    (
        "--use_fsdp --fsdp_reshard_after_forward SHARD_GRAD_OP",  # as files of `accelerate config` say it
        {"parallel.shard": -1, "parallel.replicate": 1, "parallel.reshard": False},
    ),
    ("--use_fsdp --fsdp_sharding_strategy NO_SHARD", {"parallel.shard": 1, "parallel.replicate": -1}),
    ("--use_fsdp --fsdp_sharding_strategy 4", {"parallel.shard": 2, "parallel.replicate": -1}),
    ("--use_fsdp --fsdp_version 2 --fsdp_reshard_after_forward false", {"parallel.reshard": False}),
    (
        "--use_fsdp --fsdp_version 2 --fsdp_activation_checkpointing true "
        "--fsdp_activation_checkpointing_offload true",
        {"parallel.recompute": "full", "parallel.offload": True},
    ),
    (
        "--use_fsdp --fsdp_version 2 --use_parallelism_config --parallelism_config_dp_shard_size 2 "
        "--parallelism_config_cp_size 2",
        {
            "parallel.shard": 2,
            "parallel.context": 2,
            "parallel.replicate": 1,
            "parallel.context_method": "ring",
        },
    ),
    (
        "--use_deepspeed --zero_stage 3 --offload_param_device cpu --offload_optimizer_device cpu "
        "--gradient_clipping 0.5 --gradient_accumulation_steps 2",
        {
            "parallel.micro_batch": 4,  # 32 rows over 4 ranks, in 2 parts
            "parallel.engine": "deepspeed",
            "parallel.deepspeed.zero": 3,
            "parallel.deepspeed.offload_parameters": "cpu",
            "parallel.deepspeed.offload_optimizer": "cpu",
            "optimizer.clip": 0.5,
        },
    ),
    (
        "--use_megatron_lm --megatron_lm_tp_degree 2 --megatron_lm_pp_degree 2 "
        "--megatron_lm_sequence_parallelism false --megatron_lm_recompute_activations true "
        "--megatron_lm_use_distributed_optimizer false --megatron_lm_gradient_clipping 0",
        {
            "parallel.engine": "megatron",
            "parallel.tensor": 2,
            "parallel.pipeline": 2,
            "parallel.sequence": False,
            "parallel.recompute": "attention",
            "parallel.megatron.distributed_optimizer": False,
            "optimizer.clip": None,
        },
    ),
]


@pytest.mark.parametrize(("options", "expected"), ENVIRONMENTS, ids=lambda each: str(each)[:70])
def test_what_the_launcher_asks_for(options, expected, tmp_path, monkeypatch):
    recipe = tmp_path / "job.yaml"
    recipe.write_text("run: {name: run}\n")
    for name, value in variables(f"{options} --num_processes 4").items():
        monkeypatch.setenv(name, value)
    job, rows = resolve_asked([str(recipe)], [], None, FOUR)
    made = settings_of(rows)
    assert {name: made[name] for name in expected} == expected
    for name in expected:
        assert re.match(
            r"accelerate: (ACCELERATE|FSDP|MEGATRON_LM|PARALLELISM_CONFIG|accelerate launch)",
            job.origins[name],
        )


@pytest.mark.parametrize("options", [options for options, _ in ENVIRONMENTS])
def test_a_saved_job_agrees_with_what_made_it(options, tmp_path, monkeypatch):
    """A job.yaml says everything, so that it would conflict with whatever it did not take over."""
    (tmp_path / "recipe.yaml").write_text("run: {name: run}\n")
    for name, value in variables(f"{options} --num_processes 4").items():
        monkeypatch.setenv(name, value)
    job, _ = resolve_asked([str(tmp_path / "recipe.yaml")], [], None, FOUR)
    (tmp_path / "job.yaml").write_text(dump(job))
    assert resolve_asked([str(tmp_path / "job.yaml")], [], None, FOUR)[0].job == job.job


FILES = [
    ("NO", {"num_processes": 1, "mixed_precision": "fp16"}, {"precision": "fp16"}),
    (
        "MULTI_CPU",
        {"use_cpu": True},
        {"parallel.device": "cpu", "parallel.replicate": -1, "parallel.shard": 1},
    ),
    ("MULTI_GPU", {}, {"parallel.device": "cuda", "precision": "fp32"}),
    ("MULTI_GPU", {"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, {"train.compile": True}),
    (
        "FSDP",
        {"fsdp_config": {"fsdp_version": 1, "fsdp_reshard_after_forward": "HYBRID_SHARD_ZERO2"}},
        {"parallel.shard": 2, "parallel.replicate": -1, "parallel.reshard": False},
    ),
    (
        "FSDP",
        {
            "fsdp_config": {"fsdp_version": 2, "fsdp_reshard_after_forward": True},
            "parallelism_config": {
                "parallelism_config_tp_size": 2,
                "parallelism_config_dp_replicate_size": 2,
            },
        },
        {"parallel.tensor": 2, "parallel.replicate": 2, "parallel.reshard": True},
    ),
    (
        "DEEPSPEED",
        {
            "deepspeed_config": {
                "zero_stage": 2,
                "offload_optimizer_device": "nvme",
                "offload_optimizer_nvme_path": "/local",
                "gradient_accumulation_steps": 2,
                "gradient_clipping": 1.0,
                "zero3_init_flag": False,
            },
            "parallelism_config": {
                "parallelism_config_sp_size": 2,
                "parallelism_config_sp_backend": "deepspeed",
            },
        },
        {
            "parallel.engine": "deepspeed",
            "parallel.deepspeed.zero": 2,
            "parallel.deepspeed.offload_optimizer": "nvme",
            "parallel.deepspeed.nvme_path": "/local",
            "parallel.micro_batch": 2,  # 8 rows over 2 data ranks, in 2 parts
            "optimizer.clip": 1.0,
            "parallel.context": 2,
        },
    ),
    (
        "MEGATRON_LM",
        {
            "megatron_lm_config": {
                "megatron_lm_tp_degree": 2,
                "megatron_lm_pp_degree": 2,
                "megatron_lm_num_micro_batches": 4,
                "megatron_lm_sequence_parallelism": True,
                "megatron_lm_use_distributed_optimizer": True,
                "megatron_lm_gradient_clipping": 0.5,
                "megatron_lm_recompute_activations": False,
            }
        },
        {
            "parallel.engine": "megatron",
            "parallel.tensor": 2,
            "parallel.pipeline": 2,
            "parallel.micro_batch": 2,
            "parallel.sequence": True,
            "parallel.megatron.distributed_optimizer": True,
            "optimizer.clip": 0.5,
        },
    ),
]


@pytest.mark.parametrize(("kind", "more", "expected"), FILES)
def test_what_a_file_asks_for(kind, more, expected, written, tmp_path):
    recipe = tmp_path / "job.yaml"
    recipe.write_text("train: {global_batch: 8}\n")
    job, rows = resolve_asked([str(recipe)], [], written(kind, **more), FOUR)
    made = settings_of(rows)
    assert {name: made[name] for name in expected} == expected
    assert all(job.origins[name].startswith("accelerate: ") for name in expected)


def test_a_json_file_of_deepspeed_says_what_it_says(written, tmp_path):
    own = tmp_path / "ds.json"
    tree = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}, "bf16": {"enabled": True}}
    own.write_text(json.dumps({**tree, "gradient_clipping": "auto", "gradient_accumulation_steps": 4}))
    recipe = tmp_path / "job.yaml"
    recipe.write_text("train: {global_batch: 8}\n")
    file = written("DEEPSPEED", mixed_precision=None, deepspeed_config={"deepspeed_config_file": str(own)})
    job = resolve_asked([str(recipe)], [], file, TWO)[0].job
    assert (job.parallel.deepspeed.zero, job.parallel.deepspeed.offload_parameters) == (3, "cpu")
    assert (job.parallel.deepspeed.config, job.precision, job.parallel.micro_batch) == (str(own), "bf16", 1)


def test_a_stage_that_nobody_named_is_accelerates():
    from accelerate.utils import DeepSpeedPlugin

    rows = translate(read_variables(variables("--use_deepspeed --num_processes 2")))
    assert settings_of(rows)["parallel.deepspeed.zero"] == DeepSpeedPlugin().zero_stage


def test_a_basic_file(tmp_path):
    write_basic_config("bf16", str(tmp_path / "basic.json"))
    recipe = tmp_path / "job.yaml"
    recipe.write_text("{}")
    job = resolve_asked([str(recipe)], [], str(tmp_path / "basic.json"), ALONE)[0]
    assert (job.job.precision, job.origins["precision"]) == ("bf16", "accelerate: mixed_precision")


def test_show_has_a_line_for_every_key(small_job, written, capsys):
    file = written(
        "FSDP", num_processes=2, fsdp_config={"fsdp_version": 2, "fsdp_state_dict_type": "FULL_STATE_DICT"}
    )
    settings.show([str(small_job)], [], file)
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "parallel.engine = native" in lines["distributed_type"]
    assert "checkpoints are shards" in lines["fsdp_state_dict_type"]
    for name, value in yaml.safe_load(Path(file).read_text()).items():
        if name not in SECTIONS and value != getattr(ClusterConfig, name, MISSING):
            assert name in lines
    assert "accelerate: distributed_type" in lines["parallel.engine"]
