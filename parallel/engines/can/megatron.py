"""What the Megatron-Core engine can do."""

from __future__ import annotations

from headway.parallel.engines.can.cell import TESTED, Cell, refused, supported
from headway.parallel.engines.features import DEEPSPEED_ONLY
from headway.parallel.mesh import Layout
from headway.pretrain.config import Job
from headway.pretrain.errors import JobError

WHOLE = "the distributed optimizer's flat shards have no rows: what needs whole matrices is native's"
STAGES = "Megatron-Core has 1F1B and interleaved 1F1B"

CAN: dict[str, Cell] = {
    "experts": TESTED,
    "replicate": TESTED,
    "shard": TESTED,
    "replicate x shard": TESTED,
    "tensor": TESTED,
    "sequence": TESTED,
    "context by ring": TESTED,
    "context by ulysses": TESTED,
    "expert": TESTED,
    "pipeline": TESTED,
    "schedule gpipe": refused(STAGES),
    "schedule 1f1b": TESTED,
    "schedule interleaved_1f1b": TESTED,
    "schedule interleaved_zero_bubble": refused(STAGES),
    "schedule zbv": refused(STAGES),
    "schedule dualpipev": refused(STAGES),
    "fp32": TESTED,
    "bf16": TESTED,
    "fp16 on cpu": TESTED,
    "fp16 on cuda": supported("never run on a GPU"),
    "fp64": refused("Megatron-Core's main parameters are fp32"),
    "fp8 on cpu": refused("8-bit products are native's"),
    "fp8 on cuda": refused("8-bit products are native's"),
    "adamw": TESTED,
    "muon, lamb, adafactor of whole state": TESTED,
    "muon, lamb, adafactor of state that is cut": refused(WHOLE),
    "ema": TESTED,
    "layer decay": TESTED,
    "compile": refused("Megatron-Core's layers are not compiled"),
    "recompute": TESTED,
    "offload of activations": TESTED,
    "lsuv": refused("it measures layer after layer before the engine takes the weights"),
    "spectral": TESTED,
    "distillation": refused("a teacher's taps and lessons are native's"),
    "histograms": refused("gradients are flat shards after their reduction"),
    "check of replicas": TESTED,
    **dict.fromkeys(DEEPSPEED_ONLY, refused("Megatron-Core keeps state on the device")),
}


def check(job: Job, layout: Layout) -> None:
    """Raise JobError if what the job says to Megatron-Core contradicts itself."""
    said, section = job.parallel.megatron, "parallel.megatron"
    if layout.shard > 1 and said.distributed_optimizer is False:
        rule = f"parallel.shard = {layout.shard} shards optimizer state: it takes the distributed optimizer"
        raise JobError(f"{section}.distributed_optimizer", False, rule, "true, or parallel.replicate")
    if said.overlap_param_gather and (said.distributed_optimizer is False or job.optimizer.name != "adamw"):
        rule = "without the distributed optimizer there is nothing to gather"
        raise JobError(f"{section}.overlap_param_gather", True, rule, False)
    if said.overlap_param_gather and not said.overlap_grad_reduce:
        rule = f"needs {section}.overlap_grad_reduce"
        raise JobError(f"{section}.overlap_param_gather", True, rule, f"{section}.overlap_grad_reduce = true")
