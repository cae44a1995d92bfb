"""The process of one of Accelerate's trackers.

Commands: `start` (first), `log`, `finish`. Messages: `{"run": "..."}`, `{"warning": "..."}`, `{"finished": true}`.

Every step is told once: `told.json` keeps the last step that was told, and which numbers of it. A start that goes on
from an earlier step tells nothing again, and what the tracker misses of the steps before it is read from
`metrics.jsonl`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headway.pretrain.records.backends.past import rows
from headway.pretrain.records.backends.serve import Command, brief, serve, tell
from headway.pretrain.records.backends.tracker_manners import MANNERS, Manner, filled


def main() -> None:
    serve(sys.argv[1], TrackerClient)


class TrackerClient:
    """A `GeneralTracker` of Accelerate, by name."""

    def __init__(self, start: Command) -> None:
        from accelerate.state import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        if PartialState(cpu=True).num_processes != 1:  # `tracker.environment` has taken care of it
            raise RuntimeError("Accelerate takes the tracker's process for a rank of several")
        self._name, self._refused = start["name"], set[str]()
        self._note = Path(start["folder"]) / "told.json"
        self._known: dict[str, Any] = {"id": None, "step": -1, "names": [], **read(self._note)}
        kind = LOGGER_TYPE_TO_CLASS[self._name]
        manner = MANNERS.get(self._name, Manner())
        self._finite = manner.finite
        arguments, words = self._arguments(manner, start), start["words"]
        Path(words["folder"]).mkdir(exist_ok=True)
        place = (arguments.pop("logging_dir", words["folder"]),) if kind.requires_logging_directory else ()
        self._tracker = kind(filled(manner.first, words), *place, **arguments)
        self._tracker.start()
        self._known["id"] = identity(self._tracker.tracker, manner.identity)
        self._keep()
        tell(run=f"run {self._known['id'] or words['run']}, see {start['folder']}")
        try:
            self._tracker.store_init_configuration(start["settings"])
        except Exception as error:  # mlflow takes no other value for a setting that it has
            tell(warning=f"{self._name} keeps the settings of an earlier start of the run ({brief(error)})")
        for step, values in rows(
            Path(start["run_dir"]) / "metrics.jsonl", self._known["step"] - 1, start["start_step"]
        ):
            self._log(step, values)

    def _arguments(self, manner: Manner, start: Command) -> dict[str, Any]:
        words = start["words"]
        chosen = dict(manner.begin)
        if self._known["id"]:
            words = {**words, "id": self._known["id"]}
            chosen |= manner.resume
        return {name: filled(value, words) for name, value in chosen.items()} | start["arguments"]

    def obey(self, command: Command) -> bool:
        """Carry out one command; False after the last one."""
        if command["do"] == "finish":
            self._tracker.finish()
            return False
        if command["do"] == "log":
            self._log(command["step"], command["values"])
        return True

    def leave(self) -> None:
        """Nothing is left: `finish` of a tracker waits for what it sends."""

    def _log(self, step: int, values: Mapping[str, float | int]) -> None:
        """Numbers of a step, those that were not told before."""
        last = self._known["step"]
        if step < last:
            return
        told = set(self._known["names"]) if step == last else set()
        fresh = {
            name: value
            for name, value in values.items()
            if name not in told and (math.isfinite(value) or not self._finite)
        }
        if not fresh:
            return
        try:
            self._tracker.log(fresh, step=step)
        except Exception as error:  # the curves go on after a number that is refused, or an outage
            if (fault := type(error).__name__) not in self._refused:
                self._refused.add(fault)
                tell(
                    warning=f"{self._name} did not take all of step {step} ({brief(error)}); metrics.jsonl has it"
                )
            return
        self._known |= {"step": step, "names": sorted(told | fresh.keys())}
        self._keep()

    def _keep(self) -> None:
        part = self._note.with_suffix(".part")
        part.write_text(json.dumps(self._known) + "\n", encoding="utf-8")
        part.replace(self._note)


def read(note: Path) -> dict[str, Any]:
    """What an earlier start has noted; nothing if there was none."""
    try:
        return dict(json.loads(note.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def identity(run: Any, path: str | None) -> str | None:
    """What names a run, found along attributes of the tracker's own object."""
    if path is None:
        return None
    for name in path.split("."):
        run = getattr(run, name)
        run = run() if callable(run) else run
    return str(run)


if __name__ == "__main__":
    main()
