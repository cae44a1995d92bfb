"""What `accelerate launch` tells the processes that it starts, read from their variables."""

from __future__ import annotations

import os
from collections.abc import Mapping

from headway.launch.accelerate.asks import Given, Row
from headway.launch.accelerate.deepspeed_json import read_json
from headway.launch.accelerate.mapping import REPLICAS
from headway.launch.environment import Ranks
from headway.pretrain.errors import JobError

ALWAYS = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND")
"""Each launcher of Accelerate sets one of them at least."""
USES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DEEPSPEED",
    "ACCELERATE_USE_MEGATRON_LM": "MEGATRON_LM",
}
"""Variable -> distributed_type of a config file."""
PARALLELISM = "ACCELERATE_USE_PARALLELISM_CONFIG"
SECTIONS = {
    "ACCELERATE_DYNAMO_": "dynamo.",
    "ACCELERATE_DEEPSPEED_": "deepspeed.",
    "ACCELERATE_FP8_": "fp8.",
    "FSDP_": "fsdp.",
    "MEGATRON_LM_": "megatron_lm.",
    "PARALLELISM_CONFIG_": "parallelism_config.",
    "ACCELERATE_": "",
}
"""Beginning of a variable -> section of a config file; the first that fits."""
SINGLE = "accelerate launch"


def launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether `accelerate launch` started this process, or one of those that started it."""
    return any(name in environment for name in (*ALWAYS, *USES))


def read_variables(environment: Mapping[str, str] = os.environ) -> list[Given]:
    """What was asked for; nothing where Accelerate started nothing."""
    if not launched(environment):
        return []
    given = []
    for name, value in sorted(environment.items()):
        if name in USES:
            if value.lower() == "true":
                given.append(Given(name, USES[name], "distributed_type", launched=True))
        elif name != PARALLELISM and (start := next((s for s in SECTIONS if name.startswith(s)), None)):
            key = SECTIONS[start] + name.removeprefix(start).lower()
            given.append(Given(name, value, key, launched=True))
    return [*given, *read_json(given)]


def replicas(environment: Mapping[str, str], ranks: Ranks) -> list[Row]:
    """Several ranks that were told nothing else are replicas to Accelerate; the job's own axes come first."""
    if (
        not launched(environment)
        or not ranks.spread
        or any(name in environment for name in (*USES, PARALLELISM))
    ):
        return []
    return [
        Row(SINGLE, f"{ranks.world} processes", REPLICAS, "replicas, as nothing else is said", asked=False)
    ]


def refuse_lone(environment: Mapping[str, str], ranks: Ranks) -> None:
    """Raise JobError where several processes were asked for and Accelerate started one, without a word.

    It does so without `--multi_gpu`, `--use_fsdp`, `--use_deepspeed` or `--use_megatron_lm`, also for a config file of
    distributed_type MULTI_CPU. Ranks then would meet at MASTER_ADDR, but have no number.
    """
    if not launched(environment) or ranks.source != Ranks().source:
        return
    if "MASTER_ADDR" in environment and "MASTER_PORT" in environment:
        rule = (
            "accelerate launch was asked for several processes (it set MASTER_ADDR and MASTER_PORT) and started this "
            "one alone, as it does on CPUs; MASTER_ADDR of another origin is to be unset"
        )
        way = (
            "headway train ... --nproc N, or accelerate launch --multi_gpu --num_processes N "
            "(which counts processes, on CPUs too), or --cpu with --mpirun_hostfile"
        )
        raise JobError("accelerate launch --num_processes", "more than 1", rule, way)
