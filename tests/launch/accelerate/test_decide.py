"""Who decides where a job and Accelerate both speak, and what is refused."""

import pytest

from headway.launch.accelerate.asks import Given, translate
from headway.launch.accelerate.environment import read_variables
from headway.launch.accelerate.file import read_file
from headway.launch.accelerate.job import resolve_asked, tell
from headway.pretrain.errors import HeadwayError, JobError
from headway.pretrain.recipe import resolve
from headway.tests.launch.accelerate.told import FOUR, TWO, variables


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
        "distributed_type: MEGATRON_LM\nmegatron_lm_config: {megatron_lm_tp_degree: 2.5}\n",
        "must be a whole number",
    ),
    (
        "distributed_type: MEGATRON_LM\nmegatron_lm_config: {megatron_lm_pp_degree: 0}\n",
        "must be at least 1.*: 1",
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


def test_a_file_under_the_launcher_may_not_contradict_it(written, monkeypatch, tmp_path):
    for name, value in variables("--use_fsdp --num_processes 2 --mixed_precision fp16").items():
        monkeypatch.setenv(name, value)
    (tmp_path / "job.yaml").write_text("{}")
    file = written("FSDP", mixed_precision="bf16")
    both = (
        r"mixed_precision = 'bf16': .* precision = bf16, and accelerate: ACCELERATE_MIXED_PRECISION for fp16"
    )
    with pytest.raises(JobError, match=both):
        resolve_asked([str(tmp_path / "job.yaml")], [], file, TWO)
