"""What the Megatron-Core engine can do."""

from __future__ import annotations

from headway.parallel.engines.can.cell import TESTED, Cell, refused, supported
from headway.parallel.engines.features import DEEPSPEED_ONLY

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
    "spectral x tensor": TESTED,
    "distillation": refused("a teacher's taps and lessons are native's"),
    "histograms": refused("gradients are flat shards after their reduction"),
    "check of replicas": TESTED,
    **dict.fromkeys(DEEPSPEED_ONLY, refused("Megatron-Core keeps state on the device")),
}
