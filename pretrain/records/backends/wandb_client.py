"""The process that talks to W&B, so that the training process never does.

Commands: `start` (first), `log`, `reference`, `alert`, `files`, `summary`, `finish`.
Messages: `{"run": {...}}`, `{"warning": "..."}`, `{"unsent": true}`, `{"finished": true}`.
"""

from __future__ import annotations

import base64
import io
import math
import re
from pathlib import Path
from typing import Any

from headway.pretrain.records.backends.past import rows
from headway.pretrain.records.backends.serve import Command, brief, serve, tell
from headway.pretrain.records.backends.wandb_past import catch_up, last_recorded


def main() -> None:
    serve("W&B", Client)


class Client:
    """One W&B run."""

    def __init__(self, start: Command) -> None:
        import wandb

        self.wandb, self.folder = wandb, Path(start["dir"])
        self.best = math.inf
        mode = start["mode"]
        if mode == "online" and (trouble := self._catch_up(start)):
            tell(warning=f"what was recorded offline is not in W&B yet: {trouble}")
        try:
            self._init(mode, start)
        except Exception as error:
            if mode == "offline":
                raise
            mode = "offline"
            wandb.teardown()  # its service still holds the run that could not be started
            self._init(mode, start)
            later = f"wandb sync {self.run.settings.sync_dir}"
            tell(warning=f"no W&B online ({brief(error)}); recorded offline, send it later: {later}")
        tell(
            run={"id": self.run.id, "mode": mode, "url": self.run.url, "dir": str(self.run.settings.sync_dir)}
        )
        self._describe(start)
        self._fill(start["start_step"])

    def _catch_up(self, start: Command) -> str | None:
        server = self.wandb.setup().settings.base_url
        return catch_up(self.folder / "wandb", server, start["init_timeout"])

    def _init(self, mode: Any, start: Command) -> None:
        """Begin or go on with the run; `heard` is the last step that W&B has, `last` what it had of it."""
        settings: dict[str, Any] = {
            "console": "off",
            "silent": True,
            "x_stats_pid": start["pid"],
            "x_stats_track_process_tree": True,  # with the workers that load data
            "x_stats_disk_paths": [start["dir"]],
            "x_stats_open_metrics_endpoints": start["exporters"] or None,
            "init_timeout": start["init_timeout"],
            "finish_timeout": max(1.0, start["finish_timeout"] - 3),
            "finish_timeout_raises": True,
        }
        known = self.wandb.Settings.model_fields
        arguments = start["arguments"]
        # An environment variable or a settings file of W&B's counts where the job says nothing.
        arguments["project"] = arguments["project"] or self.wandb.setup().settings.project or "headway"
        last = last_recorded(self.folder / "wandb") if mode == "offline" else {}
        self.run = self.wandb.init(
            mode=mode,
            dir=str(self.folder),
            resume="allow",
            settings=self.wandb.Settings(**{k: v for k, v in settings.items() if k in known}),
            **arguments,
        )
        # Online the server knows; offline every incarnation has a log of its own.
        self.last = last if mode == "offline" else dict(self.run.summary)
        self.heard = int(last.get("_step", -1)) if mode == "offline" else self.run.starting_step - 1

    def _describe(self, start: Command) -> None:
        if start["x_axis"] == "tokens":
            self.run.define_metric("tokens_seen")
            self.run.define_metric("*", step_metric="tokens_seen")
        for source in start["inputs"]:
            try:
                self._input(source)
            except Exception as error:
                tell(warning=f"W&B did not take the data set {source['name']} ({brief(error)})")

    def _input(self, source: Command) -> None:
        """A data set that the run reads, by reference; equal fingerprints are one version of it."""
        metadata = {k: v for k, v in source.items() if k != "uri"}
        name = re.sub(r"[^\w.-]+", "-", Path(source["name"]).name).strip("-") or "data"
        artifact = self.wandb.Artifact(name, type="dataset", metadata=metadata)
        artifact.add_reference(source["uri"], name=source["fingerprint"], checksum=False)
        if self.run.settings.mode == "online":
            self.run.use_artifact(artifact)
        else:  # `use_artifact` refuses to work offline; this is what it does online
            self.run._log_artifact(artifact, is_user_created=True, use_after_commit=True)

    def _fill(self, start_step: int) -> None:
        """Tell what W&B misses of the steps before this incarnation, and find the best evaluation of them."""
        for step, values in rows(self.folder / "metrics.jsonl", -1, start_step):
            self._log(step, values)

    def obey(self, command: Command) -> bool:
        """Carry out one command; False after the last one."""
        do = command["do"]
        if do == "finish":
            return self._finish(command["exit_code"])
        if do == "log" and command["values"]:
            self._log(command["step"], command["values"])
        try:
            self._beside(do, command)
        except Exception as error:  # the curves go on without a picture or an artifact
            tell(warning=f"W&B did not take a {do} of this run ({brief(error)})")
        return True

    def _beside(self, do: str, command: Command) -> None:
        """All that is no number of a step."""
        if do == "log" and (found := media(self.wandb, command)):
            self._log(command["step"], found)
        elif do == "reference" and Path(command["path"]).exists():  # else newer ones have replaced it
            artifact = self.wandb.Artifact(command["name"], type="checkpoint", metadata=command["metadata"])
            # Without checksums: hashing gigabytes again would only repeat the checkpoint's own manifest.
            artifact.add_reference(Path(command["path"]).as_uri(), checksum=False)
            self.run.log_artifact(artifact, aliases=command["aliases"])
        elif do == "alert":
            self.run.alert(**command["alert"])
        elif do == "files":
            for path in command["paths"]:
                self.run.save(path, base_path=str(self.folder), policy="now")
        elif do == "summary":
            self.run.summary.update(command["values"])

    def _log(self, step: int, values: dict[str, Any]) -> None:
        """A part of a step's row, unless W&B has the step."""
        self._keep_best(step, values)
        if step > self.heard:
            self.run.log(values, step=step)
        elif step == self.last.get("_step") and apart(values.get("loss"), self.last.get("loss")):
            tell(
                warning=f"W&B keeps the steps up to {step} as an earlier incarnation told them, and they differ (loss "
                f"{self.last['loss']:.6g} there, {values['loss']:.6g} here); metrics.jsonl has the present ones. "
                "For a W&B run of its own give run.name another value"
            )

    def _keep_best(self, step: int, values: dict[str, Any]) -> None:
        """W&B's own minimum (`define_metric`) begins anew with every incarnation, hence this one."""
        loss = values.get("heldout_loss")
        if loss is not None and loss < self.best:
            self.best = loss
            self.run.summary.update({"best_heldout_loss": loss, "best_heldout_step": step})

    def leave(self) -> None:
        self.wandb.teardown()

    def _finish(self, exit_code: int) -> bool:
        try:
            self.run.finish(exit_code=exit_code)
        except TimeoutError:
            tell(unsent=True)
        return False


def apart(here: float | None, there: float | None) -> bool:
    """Whether two losses of one step are more than a rounding apart; a layout that changed rounds otherwise."""
    if not isinstance(here, int | float) or not isinstance(there, int | float):
        return False
    return abs(here - there) > 1e-3 * max(abs(here), abs(there))


def media(wandb: Any, command: Command) -> dict[str, Any]:
    """Histograms, tables and pictures of a command as W&B has them."""
    found: dict[str, Any] = {}
    for name, (counts, edges) in command.get("histograms", {}).items():
        found[name] = wandb.Histogram(np_histogram=(counts, edges))
    for name, (columns, lines) in command.get("tables", {}).items():
        found[name] = wandb.Table(columns=columns, data=lines)
    for name, pictures in command.get("pictures", {}).items():
        found[name] = [wandb.Image(decoded(png), caption=caption or None) for png, caption in pictures]
    return found


def decoded(png: str) -> Any:
    from PIL import Image  # comes with matplotlib

    return Image.open(io.BytesIO(base64.b64decode(png)))


if __name__ == "__main__":
    main()
