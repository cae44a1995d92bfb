"""What the native engine can do: all of it, but for what only others name so."""

from __future__ import annotations

from headway.parallel.engines.can.cell import TESTED, Cell, refused, supported
from headway.parallel.engines.features import DEEPSPEED_ONLY, FEATURES

CAN: dict[str, Cell] = {
    **dict.fromkeys(FEATURES, TESTED),
    "fp8 on cpu": refused("products of 8-bit floats need a GPU of compute capability 9.0"),
    "fp8 on cuda": supported("tested on one GPU; between GPUs never"),
    "fp16 on cuda": supported("tested on one GPU; between GPUs never"),
    **dict.fromkeys(
        DEEPSPEED_ONLY,
        refused("FSDP2 keeps state on the device; parallel.shard spreads it over more of them"),
    ),
}
