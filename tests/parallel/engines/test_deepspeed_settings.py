"""The DeepSpeed JSON: what a job says in it, and a file of one's own beside it."""

import json

import pytest

from headway.parallel.engines.deepspeed.merge import configure
from headway.parallel.engines.deepspeed.settings import generate, stage_of
from headway.parallel.mesh import Layout
from headway.pretrain.config import Job
from headway.pretrain.errors import JobError


def job(config=None, zero="auto", model=None, optimizer=None, train=None, **parallel):
    section = {"zero": zero} | ({} if config is None else {"config": json.dumps(config)})
    section |= {
        k: parallel.pop(k) for k in ("offload_optimizer", "offload_parameters", "nvme_path") if k in parallel
    }
    return Job.model_validate({
        "model": {"hidden": 64, "heads": 4} | (model or {}),
        "data": {"tokenizer": {"kind": "bytes"}},
        "optimizer": {"lr": 1e-3, "clip": 0.5} | (optimizer or {}),
        "train": {"global_batch": 24} | (train or {}),
        "parallel": {"engine": "deepspeed", "deepspeed": section} | parallel,
    })  # fmt: skip


def test_a_job_in_deepspeeds_words():
    found = generate(job(shard=2, micro_batch=3), Layout(shard=2), "bf16")
    assert found["train_batch_size"] == 24
    assert found["train_micro_batch_size_per_gpu"] == 3
    assert found["gradient_accumulation_steps"] == 4
    assert found["gradient_clipping"] == 0.5
    assert found["zero_optimization"] == {"stage": 3}
    assert found["bf16"] == {"enabled": True}
    assert found["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "bf16" not in generate(job(shard=2), Layout(shard=2), "fp32")
    assert "bf16" not in generate(job(replicate=2, shard=1), Layout(replicate=2), "bf16")  # fp32 weights
    assert "bf16" not in generate(job(zero=1, pipeline=2), Layout(pipeline=2), "bf16")  # too
    spectral = job(shard=2, model={"spectral": True})
    assert "bf16" not in generate(spectral, Layout(shard=2), "bf16")
    assert generate(job(optimizer={"clip": None}), Layout(), "fp32")["gradient_clipping"] == 0


def test_deepspeed_reads_it_as_it_is_meant():
    pytest.importorskip("deepspeed")
    from headway.parallel.engines.deepspeed.start import load

    load("cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    asked = job(zero=3, shard=1, offload_optimizer="cpu", offload_parameters="cpu")
    read = DeepSpeedConfig(generate(asked, Layout(), "bf16"))
    assert read.train_batch_size == 24
    assert read.zero_optimization_stage == 3
    assert read.zero_config.offload_optimizer.device == "cpu"
    assert read.zero_config.offload_param.device == "cpu"
    assert read.bfloat16_config.enabled
    assert read.gradient_clipping == 0.5


@pytest.mark.parametrize(
    ("asked", "layout", "precision", "stage"),
    [
        ({"shard": 2}, Layout(shard=2), "fp32", 3),
        ({"shard": 2, "reshard": False}, Layout(shard=2), "fp32", 2),
        ({"replicate": 2, "shard": 1}, Layout(replicate=2), "fp32", 0),
        ({"replicate": 2, "shard": 1}, Layout(replicate=2), "bf16", 0),
        ({"replicate": 2, "shard": 1}, Layout(replicate=2), "fp16", 1),
        ({"shard": 1, "offload_optimizer": "cpu"}, Layout(), "fp32", 2),
        ({"shard": 1, "offload_parameters": "cpu"}, Layout(), "fp32", 3),
        ({"shard": 1, "offload_optimizer": "nvme"}, Layout(), "fp32", 3),
        ({"shard": 2, "expert": 2}, Layout(shard=2, expert=2), "fp32", 2),
        ({"shard": 2, "pipeline": 2}, Layout(shard=2, pipeline=2), "fp32", 1),
        ({"zero": 1, "shard": 2}, Layout(shard=2), "fp32", 1),
    ],
)
def test_the_stage_follows_from_the_axes(asked, layout, precision, stage):
    assert stage_of(job(**asked), layout, precision) == stage


@pytest.mark.parametrize(
    ("asked", "layout", "precision", "field", "nearest"),
    [
        ({"zero": 0}, Layout(), "fp16", "parallel.deepspeed.zero", 1),
        ({"pipeline": 2}, Layout(pipeline=2), "fp16", "precision", "native"),
        ({"model": {"spectral": True}}, Layout(), "fp16", "precision", "native"),
        ({"zero": 3, "expert": 2}, Layout(shard=2, expert=2), "fp32", "parallel.deepspeed.zero", 2),
        ({"zero": 2, "pipeline": 2}, Layout(pipeline=2), "fp32", "parallel.deepspeed.zero", 1),
        ({"zero": 1, "offload_optimizer": "cpu"}, Layout(), "fp32", "parallel.deepspeed.zero", 2),
        (
            {"pipeline": 2, "offload_optimizer": "cpu"},
            Layout(pipeline=2),
            "fp32",
            "parallel.deepspeed",
            "native",
        ),
    ],
)
def test_stages_that_cannot_be(asked, layout, precision, field, nearest):
    with pytest.raises(JobError) as refusal:
        stage_of(job(**asked), layout, precision)
    assert refusal.value.field == field
    assert str(nearest) in str(refusal.value.nearest)


@pytest.mark.parametrize("where", ["offload_optimizer", "offload_parameters"])
def test_a_disk_has_a_folder(where):
    with pytest.raises(JobError) as refusal:
        generate(job(**{where: "nvme"}), Layout(), "fp32")
    assert refusal.value.field == "parallel.deepspeed.nvme_path"
    section = generate(job(**{where: "nvme"}, nvme_path="/local"), Layout(), "fp32")["zero_optimization"]
    assert section[where.replace("parameters", "param")]["nvme_path"] == "/local"


def test_keys_that_the_job_does_not_speak_of_pass_through():
    theirs = {
        "zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 1000, "sub_group_size": 500},
        "aio": {"block_size": 4096},
        "communication_data_type": "bf16",
        "steps_per_print": 10,
    }
    found = configure(job(theirs, shard=2), Layout(shard=2), "bf16", "cpu")
    assert found["zero_optimization"] == {"stage": 3} | theirs["zero_optimization"]
    assert found["aio"] == theirs["aio"]
    assert found["communication_data_type"] == "bf16"
    assert found["steps_per_print"] == 10
    assert found["train_batch_size"] == 24


def test_what_agrees_with_the_job_is_no_conflict():
    theirs = {
        "train_batch_size": 24,
        "gradient_clipping": 0.5,
        "fp16": {"enabled": False},
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "betas": [0.9, 0.95], "torch_adam": True}},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}},
    }
    found = configure(job(theirs, shard=2), Layout(shard=2), "bf16", "cpu")
    assert found["bf16"] == {"enabled": True}


def test_auto_is_filled_in_as_hugging_face_does_it():
    theirs = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "optimizer": {
            "type": "AdamW",
            "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto"),
        },
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
    }
    found = configure(job(theirs, shard=2, micro_batch=6), Layout(shard=2), "bf16", "cpu")
    assert found["train_batch_size"] == 24
    assert found["gradient_accumulation_steps"] == 2
    assert found["bf16"] == {"enabled": True}
    assert found["fp16"] == {"enabled": False}
    assert found["optimizer"]["params"] == {
        "lr": 1e-3,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.1,
    }
    zero = found["zero_optimization"]
    assert zero["reduce_bucket_size"] == 64 * 64
    assert zero["stage3_prefetch_bucket_size"] == int(0.9 * 64 * 64)
    assert zero["stage3_param_persistence_threshold"] == 640


@pytest.mark.parametrize(
    ("theirs", "key", "owner"),
    [
        ({"train_batch_size": 32}, "train_batch_size", "train.global_batch"),
        ({"train_micro_batch_size_per_gpu": 5}, "train_micro_batch_size_per_gpu", "parallel.micro_batch"),
        ({"gradient_clipping": 1.0}, "gradient_clipping", "optimizer.clip"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type", "optimizer.name"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}, "optimizer.params.lr", "optimizer.lr"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler", "schedule.name"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage", "parallel.deepspeed.zero"),
        ({"bf16": {"enabled": True}}, "bf16.enabled", "precision"),
        ({"fp16": {"enabled": True}}, "fp16.enabled", "precision"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled", "precision"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer.device",
            "parallel.deepspeed.offload_optimizer",
        ),
    ],
)
def test_contradictions_name_both(theirs, key, owner):
    with pytest.raises(JobError) as conflict:
        configure(job(theirs, shard=2), Layout(shard=2), "fp32", "cpu")
    assert conflict.value.field == f"parallel.deepspeed.config: {key}"
    assert owner in conflict.value.rule


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"zero_optimization": {"zero_quantized_weights": True}}, "ZeRO++"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, "ZeRO++"),
        ({"zero_optimization": {"zero_hpz_partition_size": 2}}, "ZeRO++"),
        ({"optimizer": {"type": "OneBitAdam"}}, "1-bit"),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one(theirs, said):
    with pytest.raises(JobError, match=said.replace("+", r"\+")):
        configure(job(theirs, shard=2), Layout(shard=2), "fp32", "cpu")
    found = configure(job(theirs, shard=2), Layout(shard=2), "fp32", "cuda")
    assert found["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("nowhere.json", "cannot be read"),
        ('{"gradient_cliping": 1}', "none of DeepSpeed's keys"),
    ],
)
def test_files_that_cannot_be(text, said):
    asked = job(shard=2)
    parallel = asked.parallel
    section = parallel.deepspeed.model_copy(update={"config": text})
    broken = asked.model_copy(update={"parallel": parallel.model_copy(update={"deepspeed": section})})
    with pytest.raises(JobError, match=said):
        configure(broken, Layout(shard=2), "fp32", "cpu")


def test_a_file(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"overlap_comm": False}}))
    asked = job(shard=2)
    section = asked.parallel.deepspeed.model_copy(update={"config": str(file)})
    with_file = asked.model_copy(
        update={"parallel": asked.parallel.model_copy(update={"deepspeed": section})}
    )
    assert configure(with_file, Layout(shard=2), "fp32", "cpu")["zero_optimization"]["overlap_comm"] is False
