"""What the page of a run says in words: what it is, where it computes, what happened."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from headway.pretrain.records.progress import short
from headway.pretrain.records.watch.run import Events, WatchedRun, clean
from headway.pretrain.records.watch.status import ago

QUIET_KINDS = ("eval", "checkpoint")
"""Events that happen all the time, and are shown elsewhere."""
STYLES = {"warning": "yellow", "resume": "cyan", "start": "cyan"}


def describe_run(run: WatchedRun) -> str:
    """Model, precision, devices: `GPT 4 x 256, 4.2M parameters, bf16, 2 ranks (shard 2) on node1: NVIDIA H200`."""
    place, setting = run.start, run.setting
    parts = []
    if setting("model.family"):
        parts.append(
            f"{str(setting('model.family')).upper()} {setting('model.layers')} x {setting('model.hidden')}"
        )
    if isinstance(place.get("parameters"), int):
        parts.append(f"{short(place['parameters'])} parameters")
    precision = place.get("precision") or setting("precision")
    parts += [str(precision)] if precision else []
    parts.append(describe_place(place))
    return clean(", ".join(filter(None, parts)))


def describe_place(place: Mapping[str, Any]) -> str:
    """Ranks, layout, hosts and device of a start; empty if it does not say."""
    world, layout, hosts = place.get("world"), place.get("layout") or {}, place.get("hosts") or {}
    if not isinstance(world, int):
        return ""
    axes = " x ".join(f"{axis} {size}" for axis, size in layout.items())
    text = f"{world} rank{'s' if world > 1 else ''}" + (f" ({axes})" if axes else "")
    text += f" on {name_hosts(list(hosts))}" if hosts else ""
    return text + (f": {place['device']}" if place.get("device") else "")


def name_hosts(hosts: Sequence[str], shown: int = 3) -> str:
    """The first few by name."""
    named = ", ".join(hosts[:shown])
    return f"{named} and {len(hosts) - shown} more" if len(hosts) > shown else named


def describe_events(events: Events, count: int, now: float) -> list[tuple[str, str, str]]:
    """The last `count` that a person should see, oldest first: when, what, style."""
    told = [event for event in events if event.get("kind") not in QUIET_KINDS][-count:]
    return [(when(event.get("time"), now), clean(say(event)), _style(event)) for event in told]


def say(event: Mapping[str, Any]) -> str:
    """An event in words."""
    kind, step = event.get("kind"), event.get("step")
    if kind in ("start", "resume"):
        hosts = name_hosts(list(event.get("hosts") or {}))
        again = event.get("incarnation") or 0
        text = "began" if kind == "start" else f"went on from step {step}"
        return text + (f" on {hosts}" if hosts else "") + (f", incarnation {again}" if again else "")
    if kind == "warning":
        return f"step {step}: {event.get('message')}"
    if kind == "end":
        return f"{event.get('status')} at step {step}"
    rest = ", ".join(f"{k} {v}" for k, v in event.items() if k not in ("time", "kind", "step", "process"))
    return f"step {step}: {kind}" + (f", {rest}" if rest else "")


def when(moment: Any, now: float) -> str:
    """The time of day, of what is older than a day how old it is."""
    if not isinstance(moment, int | float):
        return ""
    return time.strftime("%H:%M:%S", time.localtime(moment)) if now - moment < 86400 else ago(now - moment)


def _style(event: Mapping[str, Any]) -> str:
    if event.get("kind") == "end":
        return {"done": "green", "failed": "red"}.get(str(event.get("status")), "yellow")
    return STYLES.get(str(event.get("kind")), "default")
