"""Accelerate as a launcher and a config file. What it tells ranks comes from its own launcher, files from its own
writers."""

import inspect
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import MISSING
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.config.default import write_basic_config
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import launch as launchers

from headway.launch import run, settings
from headway.launch.accelerate import mapping
from headway.launch.accelerate.asks import Given, translate
from headway.launch.accelerate.environment import launched, read_variables, refuse_lone, replicas
from headway.launch.accelerate.file import SECTIONS, check_ranks, processes, read_file
from headway.launch.accelerate.job import find_processes, resolve_asked, tell
from headway.launch.environment import Ranks
from headway.launch.local import Hosts
from headway.pretrain.errors import HeadwayError, JobError
from headway.pretrain.recipe import load_job, resolve
from headway.pretrain.records.metrics import read_metrics
from headway.tests.launch.test_train import HEADWAY

ALONE, TWO, FOUR = Ranks(), Ranks(0, 2, 0, 2, "torchrun"), Ranks(0, 4, 0, 2, "torchrun")


def variables(options):
    """What `accelerate launch OPTIONS` gives to the processes that it starts, by its own code."""
    arguments = launch_command_parser().parse_args([*options.split(), "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    arguments.main_process_port = 0
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ""
        told = launchers.prepare_deepspeed_cmd_env(arguments)[1]
    elif arguments.multi_gpu or arguments.use_fsdp or arguments.use_megatron_lm:
        told = launchers.prepare_multi_gpu_env(arguments)
    else:
        told = launchers.prepare_simple_launcher_cmd_env(arguments)[1]
    return {k: v for k, v in told.items() if k not in os.environ}


@pytest.fixture(autouse=True)
def no_default_file(monkeypatch):
    """Accelerate reads the user's own default file where none is named."""
    monkeypatch.setattr("accelerate.commands.launch.default_config_file", "/nowhere")


@pytest.fixture
def resolved(small_job, monkeypatch, tmp_path):
    """Resolve the small job under the variables of `accelerate launch OPTIONS`, or with a file of Accelerate."""

    def resolve_small(options="", file=None, ranks=TWO, sets=(), recipe=""):
        for name, value in (variables(options) if options else {}).items():
            monkeypatch.setenv(name, value)
        (tmp_path / "more.yaml").write_text(recipe or "{}")
        return resolve_asked([str(small_job), str(tmp_path / "more.yaml")], sets, file, ranks)

    return resolve_small


@pytest.fixture
def written(tmp_path):
    """A file as Accelerate writes it."""

    def write(kind="MULTI_GPU", name="accelerate.yaml", **more):
        given = {"mixed_precision": "no", "use_cpu": False, "debug": False, "num_processes": 2, **more}
        path = tmp_path / name
        ClusterConfig(compute_environment="LOCAL_MACHINE", distributed_type=kind, **given).to_yaml_file(
            str(path)
        )
        return str(path)

    return write


def settings_of(rows):
    return {name: value for row in rows for name, value in row.settings.items()}


# -- the tables are complete ----------------------------------------------------------------------------------


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


# -- what is asked for becomes the job --------------------------------------------------------------------------

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
        "--gradient_clipping 0.5",
        {
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


# -- conflicts and refusals ---------------------------------------------------------------------------------------


def test_a_recipe_that_says_otherwise_is_an_error_that_names_both(resolved):
    with pytest.raises(
        JobError,
        match=r"accelerate: ACCELERATE_MIXED_PRECISION = 'bf16': asks for precision = bf16, and .*small.yaml for fp32",
    ):
        resolved("--multi_gpu --num_processes 2 --mixed_precision bf16")


def test_the_command_line_decides(resolved):
    job, rows = resolved("--multi_gpu --num_processes 2 --mixed_precision bf16", sets=["precision=fp64"])
    assert job.job.precision == "fp64"
    assert any("precision = fp64 (command line) stands" in line for line in tell(rows))


def test_defaults_of_the_launcher_yield_to_the_recipe(resolved):
    recipe = "precision: bf16\nparallel: {shard: 2}\n"
    job, rows = resolved("--multi_gpu --num_processes 2", recipe=recipe)
    assert (job.job.precision, job.job.parallel.shard, job.job.parallel.replicate) == ("bf16", 2, 1)
    assert sum("stands" in line for line in tell(rows)) == 2


def test_an_axis_of_the_same_size_is_no_conflict(resolved, written):
    plan = {"parallelism_config_dp_shard_size": 2, "parallelism_config_tp_size": 2}
    file = written("FSDP", num_processes=4, fsdp_config={"fsdp_version": 2}, parallelism_config=plan)
    same = resolved(file=file, ranks=FOUR, recipe="precision: fp32\nparallel: {shard: -1, tensor: 2}\n")[
        0
    ].job
    assert (same.parallel.shard, same.parallel.tensor) == (2, 2)
    with pytest.raises(JobError, match=r"tp_size = 2: asks for parallel.tensor = 2, and .*more.yaml for 4"):
        resolved(file=file, ranks=FOUR, recipe="parallel: {tensor: 4}\n")


def test_conflicts_are_told_all_at_once(resolved, written):
    clip = {"zero_stage": 1, "gradient_clipping": 0.1}
    file = written("DEEPSPEED", mixed_precision="bf16", deepspeed_config=clip)
    with pytest.raises(HeadwayError) as caught:
        resolved(file=file, recipe="optimizer: {clip: 1.0}\nparallel: {deepspeed: {zero: 3}}\n")
    assert caught.value.exit_code == 2
    assert [line.split(" = ")[0] for line in str(caught.value).splitlines()] == [
        "accelerate: mixed_precision",
        "accelerate: deepspeed_config.gradient_clipping",
        "accelerate: deepspeed_config.zero_stage",
    ]


def test_micro_batches_fit_the_global_batch(resolved, written):
    def asking(steps):
        return written("DEEPSPEED", deepspeed_config={"zero_stage": 1, "gradient_accumulation_steps": steps})

    assert resolved(file=asking(4))[0].job.parallel.micro_batch == 1
    assert resolved(file=asking(1))[0].job.parallel.micro_batch is None
    resolved(file=asking(2), recipe="parallel: {micro_batch: 2}\n")
    with pytest.raises(
        JobError, match=r"steps = 3: micro-batches must divide the 4 rows of a rank .*8\).*: 2"
    ):
        resolved(file=asking(3))
    with pytest.raises(JobError, match=r"asks for parallel.micro_batch = 1, and .*more.yaml for 2"):
        resolved(file=asking(4), recipe="parallel: {micro_batch: 2}\n")


REFUSED = [
    (
        "--use_fsdp --fsdp_offload_params true",
        "FSDP_OFFLOAD_PARAMS = 'true': the native engine.*DEEPSPEED",
    ),
    ("--use_fsdp --fsdp_auto_wrap_policy SIZE_BASED_WRAP", "TRANSFORMER_BASED_WRAP"),
    ("--use_fsdp --fsdp_version 2 --fsdp_sharding_strategy HYBRID_SHARD", "parallelism_config"),
    (
        "--use_fsdp --fsdp_reshard_after_forward false",
        "with fsdp_version 1 it is a strategy.*SHARD_GRAD_OP",
    ),
    ("--multi_gpu --dynamo_backend cudagraphs", "ACCELERATE_DYNAMO_BACKEND = 'CUDAGRAPHS'.*inductor"),
    ("--multi_gpu --dynamo_mode max-autotune", "default mode"),
    (
        "--multi_gpu --enable_cpu_affinity",
        "ACCELERATE_CPU_AFFINITY = '1': Headway binds no process.*numactl",
    ),
    ("--use_megatron_lm --megatron_lm_optimizer_cpu_offload true", "OPTIMIZER_CPU_OFFLOAD.*DEEPSPEED"),
    ("--use_megatron_lm --megatron_lm_recompute_num_layers 2", "every block.*: 1"),
    ("--use_deepspeed --zero_stage 4", "ZERO_STAGE = '4'.*: 0, 1, 2, 3"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_headway_does_not_do_is_refused(options, message):
    with pytest.raises(JobError, match=message):
        translate(read_variables(variables(f"{options} --num_processes 2")))


WRONG = [
    ("distributed_type: MULTI_GPU\nnum_proceses: 2\n", r"unknown keys \(\['num_proceses'\]\)"),
    ("num_processes: 2\n", "distributed_type` must be specified"),
    ("distributed_type: FOUR_GPU\nmixed_precision: bf16\n", "FOUR_GPU"),
    ("distributed_type: [\n", "cannot read it"),
    ("- 1\n", "cannot read it"),
    ("distributed_type: MULTI_NPU\nnum_processes: 2\n", "distributed_type = 'MULTI_NPU'.*CUDA"),
    (
        "distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_ofload_params: true}\n",
        "fsdp_offload_params",
    ),
    (
        "distributed_type: MULTI_GPU\nnum_processes: 2\ndeepspeed_config: {zero_stage: 3}\n",
        "read with .*DEEPSPEED only",
    ),
    (
        "distributed_type: MULTI_CPU\nnum_processes: 2\nmpirun_config: {mpirun_hostfile: h}\n",
        "mpirun --hostfile FILE",
    ),
    ("distributed_type: MULTI_GPU\nnum_processes: 2\ntpu_zone: a\n", "tpu_zone = 'a'"),
    ("distributed_type: MULTI_GPU\nnum_processes: 2\nmixed_precision: int4\n", "int4.*: no, fp16, bf16, fp8"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_a_wrong_file_is_one_error(text, message, tmp_path):
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(JobError, match=message):
        translate(read_file(str(tmp_path / "wrong.yaml")))


def test_a_missing_file_and_one_of_sagemaker(tmp_path):
    with pytest.raises(JobError, match=r"--accelerate = '.*none.yaml'.*does not exist"):
        read_file(str(tmp_path / "none.yaml"))
    text = "compute_environment: AMAZON_SAGEMAKER\ndistributed_type: DATA_PARALLEL\n"
    text += "ec2_instance_type: a\niam_role_name: b\n"
    (tmp_path / "aws.yaml").write_text(text)
    with pytest.raises(JobError, match="SageMaker"):
        read_file(str(tmp_path / "aws.yaml"))


def test_an_unknown_variable_is_refused_and_those_of_others_are_not():
    told = {**variables("--multi_gpu --num_processes 2"), "ACCELERATE_MIXED_PRECISON": "bf16"}
    with pytest.raises(JobError, match=r"ACCELERATE_MIXED_PRECISON = 'bf16'"):
        translate(read_variables(told))
    assert read_variables({"ACCELERATE_LOG_LEVEL": "INFO", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}) == []


# -- processes ------------------------------------------------------------------------------------------------


def test_processes_of_a_file(written):
    assert processes(written(num_processes=4), None).ranks == Ranks(0, 4, 0, 4, "a config file of Accelerate")
    meet = {"main_process_ip": "10.0.0.1", "main_process_port": 29501, "rdzv_backend": "c10d"}
    found = processes(written(num_processes=8, num_machines=2, machine_rank=1, **meet), None)
    assert (found.local, found.hosts) == (4, Hosts(2, 1, "10.0.0.1", 29501, "c10d"))
    assert processes(written(num_processes=-1), 3).local == 3
    assert processes(written(num_processes=2), 2).local == 2


@pytest.mark.parametrize(
    ("more", "nproc", "message"),
    [
        ({"num_processes": 2}, 3, r"--nproc = 3: num_processes = 2 in .*: 2"),
        ({"num_processes": -1}, None, "leaves it to the command line.*--nproc N"),
        (
            {"num_processes": 3, "num_machines": 2},
            None,
            "num_processes = 3: must be a multiple of num_machines = 2",
        ),
        ({"num_processes": 2, "num_machines": 2}, None, "main_process_ip = None"),
        (
            {"num_processes": 2, "num_machines": 2, "machine_rank": 2}
            | {"main_process_ip": "a", "main_process_port": 1},
            None,
            "machine_rank = 2: must be one of 2 hosts",
        ),
    ],
)
def test_processes_that_cannot_be(more, nproc, message, written):
    with pytest.raises(JobError, match=message):
        processes(written(**more), nproc)


def test_ranks_that_others_started_are_counted(written):
    check_ranks(written(num_processes=2), TWO)
    check_ranks(written(num_processes=-1), FOUR)
    with pytest.raises(JobError, match="num_processes = 2: torchrun started 4"):
        check_ranks(written(num_processes=2), FOUR)


def test_gpus_of_a_file(written, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert find_processes(written(gpu_ids="0,1"), None).local == 2
    with pytest.raises(JobError, match="gpu_ids = '2,3': CUDA_VISIBLE_DEVICES is '0,1' here"):
        find_processes(written(gpu_ids="2,3"), None)


@pytest.mark.parametrize("options", ["--cpu", ""])
def test_a_process_that_was_to_be_several(options):
    """Without a flag that counts processes Accelerate starts one, whatever --num_processes says."""
    with pytest.raises(
        JobError, match=r"started this one alone.*--nproc N, or accelerate launch --multi_gpu"
    ):
        refuse_lone(variables(f"{options} --num_processes 2"), ALONE)
    refuse_lone(variables(f"{options} --num_processes 1"), ALONE)
    refuse_lone(variables("--multi_gpu --num_processes 2"), TWO)
    assert replicas(variables("--cpu --num_processes 1"), ALONE) == []


# -- whole runs -------------------------------------------------------------------------------------------------

SETS = ("precision=fp64", "train.steps=3", "checkpoint.every=0", "run.name=run")


def options_of(sets):
    return [part for each in sets for part in ("--set", each)]


@pytest.fixture(scope="module")
def alone(small_job, tmp_path_factory):
    """Losses of one process."""
    folder = tmp_path_factory.mktemp("alone")
    run.train([str(small_job)], [f"run.dir={folder}", *SETS])
    return [row["loss"] for row in read_metrics(folder / "run")]


def start(command, tmp_path, **more):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MASTER_", "RANK", "WORLD_SIZE"))}
    environment |= {"HF_HOME": str(tmp_path / "hf"), **more}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


LAUNCH = (sys.executable, "-m", "accelerate.commands.launch")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "axis"),
    [
        (("--multi_gpu",), "replicate 2"),
        pytest.param(("--use_fsdp", "--fsdp_version", "2"), "shard 2", marks=pytest.mark.matrix),
        pytest.param(("--cpu", "--mpirun_hostfile"), "replicate 2", marks=pytest.mark.matrix),
    ],
    ids=["multi_gpu", "fsdp", "mpirun"],
)
def test_two_ranks_of_accelerate_launch_draw_the_curve_of_one(options, axis, alone, small_job, tmp_path):
    port = 0
    if "--mpirun_hostfile" in options:
        if not shutil.which("mpirun") or "Open MPI" not in subprocess.getoutput("mpirun --version"):
            pytest.skip("NOT TESTED: mpirun is not Open MPI's (apt install openmpi-bin)")
        (tmp_path / "hosts").write_text("localhost slots=2\n")
        options = *options, str(tmp_path / "hosts")
    command = [
        *LAUNCH,
        *options,
        "--num_processes",
        "2",
        "--main_process_port",
        str(port),
        "--no_python",
        *HEADWAY,
    ]
    command += ["train", str(small_job), *options_of([f"run.dir={tmp_path}", *SETS])]
    done = start(command, tmp_path, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    assert done.returncode == 0, done.stderr
    assert f"2 rank(s), {axis}" in done.stdout
    assert "ACCELERATE_MIXED_PRECISION = no -> precision = fp64 (command line) stands" in done.stdout
    losses = [row["loss"] for row in read_metrics(tmp_path / "run")]
    assert losses == pytest.approx(alone, rel=1e-12)  # fp64; sums of two ranks are added in another order
    origin = load_job(tmp_path / "run" / "job.yaml").origins
    assert origin["parallel.shard"].startswith("accelerate: ")
    assert origin["optimizer.lr"] == str(small_job)


@pytest.mark.slow
def test_a_lone_process_is_refused_under_the_launcher(small_job, tmp_path):
    done = start(
        [*LAUNCH, "--cpu", "--num_processes", "2", "--no_python", *HEADWAY, "train", str(small_job)], tmp_path
    )
    assert done.returncode != 0
    assert "headway: accelerate launch --num_processes" in done.stderr
    assert "started this one alone" in done.stderr


@pytest.mark.slow
def test_a_file_starts_its_ranks(alone, small_job, written, tmp_path):
    file = written("MULTI_CPU", use_cpu=True)
    command = [
        *HEADWAY,
        "train",
        str(small_job),
        "--accelerate",
        file,
        *options_of([f"run.dir={tmp_path}", *SETS]),
    ]
    done = start(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 rank(s), replicate 2" in done.stdout
    assert [row["loss"] for row in read_metrics(tmp_path / "run")] == pytest.approx(alone, rel=1e-12)


@pytest.mark.matrix
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_two_hosts_of_a_file_meet(rendezvous, alone, small_job, written, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = {
        "num_machines": 2,
        "main_process_ip": "127.0.0.1",
        "main_process_port": port,
        "rdzv_backend": rendezvous,
    }
    agents = []
    for host in (0, 1):
        file = written("MULTI_CPU", f"{host}.yaml", machine_rank=host, use_cpu=True, **meet)
        more = options_of([f"run.dir={tmp_path}", *SETS])
        command = [*HEADWAY, "train", str(small_job), "--accelerate", file, *more]
        agents.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert [row["loss"] for row in read_metrics(tmp_path / "run")] == pytest.approx(alone, rel=1e-12)


def test_without_accelerate_nothing_changes(small_job):
    assert resolve_asked([str(small_job)], [], None, TWO) == (resolve([str(small_job)]), [])


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(JobError, match=r"fsdp_ofload_params.*Nearest legal choice: fsdp_offload_params"):
        translate(
            [
                Given("distributed_type", "FSDP", "distributed_type"),
                Given("fsdp_ofload_params", True, "fsdp.ofload_params"),
            ]
        )
