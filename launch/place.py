"""Where a run computes: what its records tell of ranks, hosts and devices."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from headway.launch.accelerate.environment import launched
from headway.launch.assemble import Parts
from headway.launch.environment import find_ranks, this_start
from headway.parallel.checkpoint.manifest import read_manifest
from headway.parallel.mesh import AXES, World
from headway.pretrain.device import device_name
from headway.pretrain.records.report import environment

NAME = 64
"""Bytes of a host's name, at most (HOST_NAME_MAX of Linux)."""


def find_place(parts: Parts, checkpoint: Path | None) -> dict[str, Any]:
    """`launcher, job, incarnation, world, layout, hosts, device, precision, environment, parameters`, and `imported`:
    whose weights those are that a run began with. Collective.

    Args:
        checkpoint: from which the run goes on.
    """
    world = parts.world
    imported = read_manifest(checkpoint).numbers.get("imported") if checkpoint and world.main else None
    layout = {axis: size for axis in (*AXES, "expert") if (size := getattr(world.layout, axis)) > 1}
    return {
        "launcher": ("accelerate launch, " if launched() else "") + find_ranks().source,
        "job": this_start().job,
        "incarnation": this_start().count,
        "world": world.size,
        "layout": layout,
        "hosts": find_hosts(world),
        "device": device_name(world.device),
        "precision": parts.hardware.precision,
        "environment": environment(),
        "parameters": parts.engine.parameters(),
        **({"imported": Path(imported).name} if imported else {}),
    }


def find_hosts(world: World) -> dict[str, list[int]]:
    """Name of each host, and the ranks that it has; the same on all ranks. Collective."""
    name = socket.gethostname().encode()[:NAME].ljust(NAME, b"\0")
    names = [name]
    if world.size > 1:
        mine = torch.tensor(list(name), dtype=torch.uint8, device=world.device)
        all_names = [torch.empty_like(mine) for _ in range(world.size)]
        dist.all_gather(all_names, mine, group=world.everyone)
        names = [bytes(each.tolist()) for each in all_names]
    hosts: dict[str, list[int]] = {}
    for rank, each in enumerate(names):
        hosts.setdefault(each.rstrip(b"\0").decode(errors="replace"), []).append(rank)
    return hosts
