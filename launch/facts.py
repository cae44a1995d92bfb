"""What a run is beside its job and its place: what W&B's config and the like are told."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from headway.launch.assemble import Parts
from headway.pretrain.data.cache import fingerprint
from headway.pretrain.data.store import TokenStore, part


def facts(parts: Parts) -> dict[str, Any]:
    """Plain values: sizes, whether it is compiled, versions, the Slurm job, the data."""
    hardware, job = parts.hardware, parts.job
    return {
        "flops_per_row": parts.yardstick.flops_per_row,
        "compiled": hardware.compiled,
        "peak_flops": hardware.peak,
        "tokens_per_step": job.train.global_batch * job.row_tokens,
        "versions": {"python": platform.python_version()} | {n: _version(n) for n in ("headway", "torch")},
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "data": _data(parts),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _data(parts: Parts) -> list[dict[str, Any]]:
    """Token stores that are trained on: where, their fingerprint, how large; of images nothing is built."""
    prepared, found = parts.dataset.prepared, []
    for source, (prefix, weight) in zip(
        parts.job.data.sources, prepared.train if prepared else [], strict=False
    ):
        store, stored = TokenStore(prefix), part(prefix, ".bin").stat()
        mark = store.facts.get("mark") or fingerprint(size=stored.st_size, mtime=stored.st_mtime_ns)
        found.append(
            {
                "source": source.path,
                "uri": part(prefix.resolve(), ".bin").as_uri(),
                "fingerprint": mark,
                "weight": weight,
                "tokens": store.tokens,
            }
        )
    return found
