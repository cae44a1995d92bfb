"""What W&B has heard of a run from its earlier incarnations, so that every step is told once.

A run that was killed at step 14 and goes on from its checkpoint of step 10 computes steps 11 to 14 again, to the
same bits. W&B's history only grows: its client drops a step that it has heard online, and `wandb sync` gives a step
that the server has the next free number, which shifts the whole rest of the curve. So steps that are in W&B
already are not told again, and steps that it misses are taken from `metrics.jsonl`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


def catch_up(folder: Path, server: str, patience: float) -> str | None:
    """Upload what earlier incarnations recorded offline, before this one goes on online.

    Args:
        folder: W&B's folder in the run folder.
        server: base address.
        patience: seconds in which the server must have answered something.

    Returns:
        What went wrong; None if there was nothing to upload, nobody to upload it to, or it was uploaded.
    """
    unsent = [d for d in sorted(folder.glob("offline-run-*")) if not list(d.glob("*.synced"))]
    if not unsent or not answers(server, patience):
        return None
    command = [sys.executable, "-P", "-m", "wandb", "sync", *map(str, unsent)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    except subprocess.TimeoutExpired:
        return "wandb sync took more than 600 s"
    missing = [d.name for d in unsent if not list(d.glob("*.synced"))]
    return f"{missing[0]}: {' '.join(done.stderr.split())[-200:]}" if missing else None


def answers(server: str, patience: float) -> bool:
    """Whether there is a server, whatever it says."""
    try:
        urllib.request.urlopen(server, timeout=patience).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


def last_recorded(folder: Path) -> dict[str, Any]:
    """The last values of the newest of W&B's logs that has some; `_step` is their step.

    Read by W&B's own reader; a log that it cannot read is passed over.
    """
    logs = folder.glob("*run-*-*/run-*.wandb")
    for log in sorted(
        logs, key=lambda p: p.parent.name.removeprefix("offline-"), reverse=True
    ):  # by their time
        command = [sys.executable, "-P", "-m", "wandb", "leet", "inspect", "--summary", "--json", str(log)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        try:
            found = json.loads(done.stdout)["summary"]
        except (ValueError, KeyError, TypeError):
            continue
        if "_step" in found:
            return dict(found)
    return {}
