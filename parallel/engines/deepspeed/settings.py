"""The DeepSpeed JSON of a job."""

from __future__ import annotations

from typing import Any

from headway.parallel.mesh import Layout, rows_per_micro_batch
from headway.pretrain.config import Job
from headway.pretrain.errors import JobError

Json = dict[str, Any]


def narrow(job: Job, precision: str, stage: int, layout: Layout) -> bool:
    """Whether weights are narrow, beside fp32 masters.

    In bf16 they stay fp32, and the forward runs under autocast: without ZeRO, where DeepSpeed has no masters; between
    the stages of a pipeline, where gradients of many micro-batches would add up in the weights' precision; and where
    the norms of matrices are followed, which are known in fp32 (`model.spectral`).
    """
    return precision == "fp16" or (
        precision == "bf16" and stage > 0 and layout.pipeline == 1 and not job.model.spectral
    )


def stage_of(job: Job, layout: Layout, precision: str) -> int:
    """The stage of ZeRO: what `parallel.deepspeed.zero` says, or what follows from the axes.

    Raises:
        JobError: the stage cannot be had with something else that the job asks for.
    """
    asked, offload = job.parallel.deepspeed.zero, job.parallel.deepspeed
    lowest, why = 0, ""
    if precision == "fp16":
        lowest, why = 1, "without ZeRO, DeepSpeed accumulates gradients in the narrow precision, and drifts"
    if offload.offload_optimizer != "none":
        lowest, why = 2, "offload of optimizer state begins at stage 2"
    if offload.offload_optimizer == "nvme":
        lowest, why = 3, "offload to NVMe is stage 3's"
    if offload.offload_parameters != "none":
        lowest, why = 3, "offload of parameters is stage 3's"
    highest, but = 3, ""
    if layout.expert > 1:
        highest, but = 2, "experts over ranks end at stage 2 (parallel.expert)"
    if precision == "fp16" and (layout.pipeline > 1 or job.model.spectral):
        beside = "parallel.pipeline" if layout.pipeline > 1 else "model.spectral"
        rule = f"the DeepSpeed engine keeps fp32 weights with {beside}, and has no loss scale then"
        raise JobError("precision", "fp16", rule, "bf16, or parallel.engine = native")
    if layout.pipeline > 1:
        highest, but = 1, "a pipeline ends at stage 1 (parallel.pipeline)"
    if job.optimizer.name != "adamw":
        highest, but = 0, f"flat shards have no rows, which optimizer.name {job.optimizer.name} looks at"
    if lowest > highest:
        raise JobError(
            "parallel.deepspeed", f"stage {lowest}", f"{why}, but {but}", "parallel.engine = native"
        )
    if asked == "auto":
        wanted = 0 if layout.shard == 1 else 3 if job.parallel.reshard else 2
        return min(max(wanted, lowest), highest)
    if not lowest <= asked <= highest:
        limit, rule = (lowest, why) if asked < lowest else (highest, but)
        raise JobError("parallel.deepspeed.zero", asked, rule, limit)
    return asked


def generate(job: Job, layout: Layout, precision: str) -> Json:
    """What a job says in DeepSpeed's words.

    Args:
        job: its axes, batch, optimizer and the section `parallel.deepspeed`.
        layout: ranks along each axis.
        precision: fp32, bf16 or fp16: `auto` has been settled.
    """
    rows = rows_per_micro_batch(job, layout.data)
    stage = stage_of(job, layout, precision)
    found: Json = {
        "train_batch_size": job.train.global_batch,
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": job.train.global_batch // (rows * layout.data),
        "gradient_clipping": job.optimizer.clip or 0.0,
        "zero_optimization": zero_section(job, stage),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW where there is offload: the other one is compiled
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device at every micro-batch
    }
    if narrow(job, precision, stage, layout):
        # Sums stay in fp32, as in the other engines.
        found |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    if precision == "bf16" and narrow(job, precision, stage, layout):
        found["bf16"] = {"enabled": True}
    if precision == "fp16":
        # What DeepSpeed's own scaler would do; the engine scales by `pretrain.optim.scaler.LossScale`.
        found["fp16"] = {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 2000,
            "hysteresis": 1,
        }
    return found


def zero_section(job: Job, stage: int) -> Json:
    """`zero_optimization`: the stage, and where things are kept.

    Raises:
        JobError: something is kept on NVMe, and no folder is named.
    """
    asked = job.parallel.deepspeed
    if "nvme" in (asked.offload_optimizer, asked.offload_parameters) and not asked.nvme_path:
        rule = "must name a folder on a local disk, which no other run uses, where something is kept on nvme"
        raise JobError("parallel.deepspeed.nvme_path", asked.nvme_path, rule, "e.g. /local_nvme/RUN")
    section: Json = {"stage": stage}
    for key, where in (
        ("offload_optimizer", asked.offload_optimizer),
        ("offload_param", asked.offload_parameters),
    ):
        if where != "none":
            section[key] = {"device": where}
        if where == "nvme":
            section[key]["nvme_path"] = asked.nvme_path
        if where == "nvme" and key == "offload_param":
            section[key]["max_in_cpu"] = 0  # else the first 10^9 numbers stay in host memory
    return section
