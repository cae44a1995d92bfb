"""W&B from the side of the training process: hand over, never wait, never fail.

The client lives in a process of its own (`wandb_client.py`). Handing over a step is one write to a pipe that
does not block; only `finish` waits, for a stated time.
"""

from __future__ import annotations

import contextlib
import json
import netrc
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from headway.pretrain.config import Tracking
from headway.pretrain.errors import JobError

_BUFFER = 64 * 2**20
"""Bytes that may wait for a client that does not read."""


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


class WandbTracker:
    """One W&B run under `run_dir/wandb`; its id is kept there, so that a resumed run goes on in the same one.

    Args:
        config: the resolved job, plain values.
        warn: called with one sentence when something is amiss.
        say: called with the address of an online run.
        init_timeout: seconds that the server has to answer before the run is recorded offline.
        finish_timeout: seconds that the end of the run waits for the last uploads.
    """

    def __init__(
        self,
        run_dir: Path,
        mode: str,
        tracking: Tracking,
        config: Mapping[str, Any],
        *,
        warn: Callable[[str], None],
        say: Callable[[str], None] = lambda text: None,
        init_timeout: float = 20.0,
        finish_timeout: float = 30.0,
    ) -> None:
        self._folder, self._name = run_dir.resolve() / "wandb", run_dir.resolve().name
        self._warn, self._say, self._timeout = warn, say, finish_timeout
        self._pending, self._inbox = bytearray(), b""
        self._alive, self._warned = True, False
        self.run: dict[str, Any] = {}
        self._folder.mkdir(parents=True, exist_ok=True)
        with open(self._folder / "client.log", "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "headway.pretrain.records.backends.wandb_client"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "WANDB_SILENT": "true"},
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self._send(
            do="start",
            dir=str(run_dir.resolve()),
            mode=mode,
            id=_run_id(self._folder / "run.json"),
            project=tracking.project,
            name=self._name,
            group=tracking.group,
            tags=list(tracking.tags),
            config=dict(config),
            pid=os.getpid(),
            init_timeout=init_timeout,
        )

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Scalars of a step; values of the same step add up to one row."""
        self._send(do="log", step=step, values={k: v for k, v in values.items() if k != "step"})

    def histograms(self, step: int, histograms: Mapping[str, tuple[list[float], list[float]]]) -> None:
        """Counts and bin edges by name."""
        self._send(do="log", step=step, values={}, histograms=dict(histograms))

    def event(self, kind: str, step: int, fields: Mapping[str, Any]) -> None:
        """Of a checkpoint a reference artifact: W&B learns where it is; nothing is uploaded."""
        if kind == "checkpoint":
            self._checkpoint(step, Path(fields["path"]))

    def _checkpoint(self, step: int, path: Path) -> None:
        self._send(
            do="reference",
            name=f"{self._name}-checkpoint",
            path=str(path.resolve()),
            aliases=["latest", f"step-{step}"],
            metadata={"step": step},
        )

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        if status == "fenced":  # to finish would mark the run as failed that another process goes on with
            return self._end(patience=0.0)
        self.finish({"done": 0, "stopped": 0}.get(status, 1), summary)

    def finish(self, exit_code: int = 0, summary: Mapping[str, Any] | None = None) -> None:
        """Hand over the rest and wait, at most `finish_timeout` seconds; then the client is ended."""
        if summary:
            self._send(do="summary", values=dict(summary))
        self._send(do="finish", exit_code=exit_code)
        deadline = time.monotonic() + self._timeout
        finished = False
        while self._alive and not finished and time.monotonic() < deadline:
            waiting = [self._in] if self._pending else []
            select.select([self._out], waiting, [], max(0.0, deadline - time.monotonic()))
            self._push()
            finished = self._listen()
        if self._alive and not finished:
            later = f"send it later: wandb sync {self.run.get('dir', self._folder)}"
            self._warn(f"W&B did not take the last data within {self._timeout:.0f} s; {later}")
        self._end(patience=5.0 if finished else 0.0)

    def _send(self, **command: Any) -> None:
        if not self._alive:
            return
        self._pending += (json.dumps(command, default=str) + "\n").encode()
        self._push()
        self._listen()
        if len(self._pending) > _BUFFER:
            self._warn(
                "the W&B client does not read any more; it is left behind, metrics.jsonl has everything"
            )
            self._end(patience=0.0)

    def _push(self) -> None:
        try:
            while self._pending:
                del self._pending[: os.write(self._in, self._pending)]
        except BlockingIOError:
            return
        except OSError:  # the client is gone; it has said why, or the pipe's end says so
            self._pending.clear()

    def _listen(self) -> bool:
        """Pass on what the client says; True once it has finished."""
        finished, chunk = False, b"-"
        while chunk:
            try:
                chunk = os.read(self._out, 65536)
            except BlockingIOError:
                break
            self._inbox += chunk
        *lines, self._inbox = self._inbox.split(b"\n")
        for line in lines:
            message = json.loads(line)
            finished = finished or "finished" in message
            if "run" in message:
                self.run = message["run"]
                if self.run["url"]:
                    self._say(f"W&B: {self.run['url']}")
            if "warning" in message:
                self._warned = True
                self._warn(message["warning"])
        if not chunk and not finished:  # the end of its output
            if not self._warned:
                self._warn(f"the W&B client ended early, see {self._folder / 'client.log'}; the run goes on")
            self._end(patience=1.0)
        return finished

    def _end(self, patience: float) -> None:
        self._alive = False
        self._pending.clear()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # W&B's service too, if it is stuck
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()


def _run_id(path: Path) -> str:
    """The W&B run of this run folder: read, or drawn and written."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(path.read_text())["id"])
    name = secrets.token_hex(4)
    path.write_text(json.dumps({"id": name}) + "\n")
    return name
