"""W&B from the side of the training process: hand over, never wait, never fail.

The client lives in a process of its own (`wandb_client.py`), behind a pipe (`pipe.py`).
"""

from __future__ import annotations

import base64
import contextlib
import json
import netrc
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from headway.pretrain.errors import JobError
from headway.pretrain.records.backends.base import Gallery, Told
from headway.pretrain.records.backends.pipe import ClientPipe


def wandb_mode(requested: str) -> str:
    """`online`, `offline` or `off`. `auto` obeys $WANDB_MODE, else is online where an API key is found.

    Raises JobError if `online` was asked for and there is no key.
    """
    if requested == "online" and not has_api_key():
        rule = "needs an API key in $WANDB_API_KEY or in ~/.netrc (wandb login writes it)"
        raise JobError("tracking.wandb", requested, rule, "offline")
    if requested != "auto":
        return requested
    wanted = os.environ.get("WANDB_MODE", "")
    if wanted in ("disabled", "dryrun", "offline"):
        return "off" if wanted == "disabled" else "offline"
    return "online" if has_api_key() else "offline"


def has_api_key() -> bool:
    """Whether W&B's client will find a key: in the environment or in netrc, for the server in use."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    for path in (os.environ.get("NETRC"), Path.home() / ".netrc", Path.home() / "_netrc"):
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if path and netrc.netrc(str(path)).authenticators(host):
                return True
    return False


ALERT_WAIT = 1800.0
"""Seconds in which one kind of alert is sent once."""
LEVELS = {"diverged": "ERROR", "failed": "ERROR", "checkpoint": "WARN", "done": "INFO"}
KEPT = ("job.yaml", "report.html", "summary.json", "MODEL_CARD.md")
"""Files of the run folder that are uploaded at the end, those that are there."""


class WandbTracker:
    """One W&B run under `run_dir/wandb`; its id is kept there, so that a resumed run goes on in the same one.

    Args:
        mode: `online` or `offline`.
        init_timeout: seconds that the server has to answer before the run is recorded offline.
        finish_timeout: seconds that the end of the run waits for the last uploads.
    """

    def __init__(
        self, told: Told, mode: str, *, init_timeout: float = 20.0, finish_timeout: float = 30.0
    ) -> None:
        run_dir, tracking = told.run_dir.resolve(), told.job.tracking
        self._run_dir, self._folder, self._name = run_dir, run_dir / "wandb", run_dir.name
        self._warn, self._say = told.warn, told.say
        self._alerts, self._steps = frozenset(tracking.alerts), told.job.train.steps
        self._alerted = dict[str, float]()
        self.run: dict[str, Any] = {}
        self.client = ClientPipe(
            "W&B",
            ["headway.pretrain.records.backends.wandb_client"],
            self._folder,
            {**os.environ, "WANDB_SILENT": "true"},
            told.warn,
            self._heard,
            finish_timeout,
        )
        self.client.send(
            do="start",
            dir=str(run_dir),
            mode=mode,
            start_step=told.start_step,
            pid=os.getpid(),
            init_timeout=init_timeout,
            finish_timeout=finish_timeout,
            x_axis=tracking.x_axis,
            exporters=tracking.exporters,
            inputs=[one for one in told.facts.get("data", []) if one.get("uri") and one.get("fingerprint")],
            last_words=self._alert_of(
                "failed",
                "killed",
                "The training process ended without a word: killed, or its machine is gone.",
            ),
            arguments={
                "id": _run_id(self._folder / "run.json"),
                "name": self._name,
                "config": {**told.job.model_dump(mode="json"), "facts": {**told.place, **told.facts}},
                "entity": tracking.entity,
                "project": tracking.project,
                "group": tracking.group,
                "job_type": tracking.job_type,
                "tags": tracking.tags or None,
                "notes": tracking.notes,
            },
        )

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Scalars of a step; values of the same step add up to one row."""
        self.client.send(do="log", step=step, values={k: v for k, v in values.items() if k != "step"})

    def histograms(self, step: int, histograms: Mapping[str, tuple[list[float], list[float]]]) -> None:
        """Counts and bin edges by name."""
        self.client.send(do="log", step=step, values={}, histograms=dict(histograms))

    def show(self, step: int, gallery: Gallery) -> None:
        """Tables, and pictures as PNG; they are a part of the step's row."""
        self.client.send(
            do="log",
            step=step,
            values={},
            tables={name: [list(t.columns), [list(r) for r in t.rows]] for name, t in gallery.tables.items()},
            pictures={
                name: [[base64.b64encode(p.png).decode(), p.caption] for p in pictures]
                for name, pictures in gallery.pictures.items()
            },
        )

    def event(self, kind: str, step: int, fields: Mapping[str, Any]) -> None:
        """Of a checkpoint a reference artifact: W&B learns where it is; nothing is uploaded. Of failures an alert."""
        if kind == "checkpoint":
            self._checkpoint(step, Path(fields["path"]))
        elif kind == "failure":
            diverged = fields["error"] in ("NonFiniteError", "DivergenceError")
            alert = "diverged" if diverged else "failed"
            self._alert(
                alert, alert, f"After step {step} of {self._steps}: {fields['error']}: {fields['message']}"
            )
        elif kind == "warning" and fields.get("about") == "checkpoint":
            self._alert("checkpoint", "has no new checkpoint", f"After step {step}: {fields['message']}")

    def _checkpoint(self, step: int, path: Path) -> None:
        self.client.send(
            do="reference",
            name=f"{self._name}-checkpoint",
            path=str(path.resolve()),
            aliases=["latest", f"step-{step}"],
            metadata={"step": step},
        )

    def _alert(self, kind: str, what: str, text: str) -> None:
        alert, now = self._alert_of(kind, what, text), time.monotonic()
        if alert and now - self._alerted.get(kind, -ALERT_WAIT) >= ALERT_WAIT:
            self._alerted[kind] = now
            self.client.send(do="alert", alert=alert)

    def _alert_of(self, kind: str, what: str, text: str) -> dict[str, Any] | None:
        """Arguments of W&B's alert; None if nobody asked for this kind. W&B limits titles to 63 characters."""
        if kind not in self._alerts:
            return None
        title = f"{self._name[: 60 - len(what)]}: {what}"
        return {"title": title, "text": text[:2000], "level": LEVELS[kind], "wait_duration": ALERT_WAIT}

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        """Upload what is small, tell that it is done."""
        if status == "fenced":  # to finish would mark the run as failed that another process goes on with
            return self.client.end(patience=0.0)
        if status == "done":
            best = ", ".join(f"{k} {v:.4g}" for k, v in summary.items() if k.startswith("heldout_loss"))
            self._alert("done", "done", f"All {self._steps} steps are trained. {best}")
        kept = [str(self._run_dir / name) for name in KEPT if (self._run_dir / name).exists()]
        self.client.send(do="files", paths=kept)
        self.finish({"done": 0, "stopped": 0}.get(status, 1), summary)

    def finish(self, exit_code: int = 0, summary: Mapping[str, Any] | None = None) -> None:
        """Hand over the rest and wait, at most `finish_timeout` seconds; then the client is ended.

        W&B itself gives up uploading a little earlier, so that it still closes its log on disk.
        """
        if summary:
            self.client.send(do="summary", values=dict(summary))
        self.client.send(do="finish", exit_code=exit_code)
        self.client.finish(self._later)

    def _later(self) -> str:
        if self.run.get("mode") == "online":
            # What the server already has of this run it would get twice: hence a run of its own.
            return f"send it later: wandb sync --include-online --id {self.run['id']}-again {self.run['dir']}"
        return f"send it later: wandb sync {self.run.get('dir', self._folder)}"

    def _heard(self, message: dict[str, Any]) -> None:
        if message.get("unsent"):
            self._warn(f"W&B did not take the last data; {self._later()}")
        if "run" in message:
            self.run = message["run"]
            if self.run["url"]:
                self._say(f"W&B: {self.run['url']}")


def _run_id(path: Path) -> str:
    """The W&B run of this run folder: read, or drawn and written."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(path.read_text())["id"])
    name = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    path.write_text(json.dumps({"id": name}) + "\n")
    return name
