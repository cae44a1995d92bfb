"""What a JSON file of DeepSpeed says of a job, where Accelerate names one (`deepspeed_config_file`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headway.launch.accelerate.asks import Given
from headway.pretrain.errors import JobError

KEYS = {
    "zero_optimization.stage": "deepspeed.zero_stage",
    "zero_optimization.offload_optimizer.device": "deepspeed.offload_optimizer_device",
    "zero_optimization.offload_param.device": "deepspeed.offload_param_device",
    "zero_optimization.offload_optimizer.nvme_path": "deepspeed.offload_optimizer_nvme_path",
    "zero_optimization.offload_param.nvme_path": "deepspeed.offload_param_nvme_path",
    "gradient_clipping": "deepspeed.gradient_clipping",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
}
"""Keys that are settings of a job, as `mapping.RULES` names them. The engine reads the rest, and compares all."""
ENABLED = {"bf16.enabled": "bf16", "fp16.enabled": "fp16"}


def read_json(given: Sequence[Given]) -> list[Given]:
    """What the file says, if one is named; what is "auto" in it, the job says. Raises JobError if it is no JSON."""
    named = next((one for one in given if one.name == "deepspeed.config_file"), None)
    if named is None or str(named.value).lower() == "none":
        return []
    path = str(named.value)
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JobError(named.key, path, f"cannot be read as JSON: {error}") from None
    found = [Given(f"{path}: {key}", _find(tree, key), name) for key, name in KEYS.items()]
    precisions = [
        Given(f"{path}: {k}", p, "mixed_precision") for k, p in ENABLED.items() if _find(tree, k) is True
    ]
    return [one for one in (*found, *precisions) if one.value not in (None, "auto")]


def _find(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree
