"""What the DeepSpeed engine can do."""

from __future__ import annotations

from headway.parallel.engines.can.cell import TESTED, Cell, refused, supported

WHOLE = "ZeRO's flat shards have no rows: what needs whole matrices is native's"

CAN: dict[str, Cell] = {
    "experts": TESTED,
    "replicate": TESTED,
    "shard": TESTED,
    "replicate x shard": refused("ZeRO shards over all data ranks"),
    "tensor": TESTED,
    "sequence": TESTED,
    "context by ring": TESTED,
    "context by ulysses": TESTED,
    "expert": TESTED,
    "pipeline": TESTED,
    "schedule gpipe": TESTED,
    "schedule 1f1b": TESTED,
    "schedule interleaved_1f1b": TESTED,
    "schedule interleaved_zero_bubble": TESTED,
    "schedule zbv": TESTED,
    "schedule dualpipev": TESTED,
    "fp32": TESTED,
    "bf16": TESTED,
    "fp16 on cpu": refused("DeepSpeed has fp16 on GPUs alone"),
    "fp16 on cuda": supported("DeepSpeed has it on GPUs alone, where it was never run"),
    "fp64": refused("DeepSpeed's buffers are fp32 at most"),
    "fp8 on cpu": refused("8-bit products are native's"),
    "fp8 on cuda": refused("8-bit products are native's"),
    "adamw": TESTED,
    "muon, lamb, adafactor of whole state": TESTED,
    "muon, lamb, adafactor of state that is cut": refused(WHOLE),
    "ema": TESTED,
    "layer decay": TESTED,
    "compile": refused("ZeRO's hooks are not compiled"),
    "recompute": TESTED,
    "offload of activations": TESTED,
    "lsuv": refused("it measures layer after layer before the engine takes the weights"),
    "spectral": TESTED,
    "distillation": refused("a teacher's taps and lessons are native's"),
    "histograms": refused("gradients are flat shards after their reduction"),
    "check of replicas": TESTED,
    "offload of optimizer state to cpu": TESTED,
    "offload of optimizer state to nvme": TESTED,
    "offload of optimizer state to nvme x ema": refused("an average reads all weights after every step"),
    "offload of parameters to cpu": TESTED,
    "offload of parameters to nvme": TESTED,
}
