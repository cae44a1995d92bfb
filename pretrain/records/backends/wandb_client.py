"""The process that talks to W&B, so that the training process never does.

Reads one JSON command a line from standard input and answers with one JSON message a line on standard output.
A dead server, a bad key or a full disk stops this process at most. If the training process is killed, the end
of the input is seen here and the W&B run is finished with everything that was sent.

Commands: `start` (first), `log`, `reference`, `summary`, `finish`.
Messages: `{"run": {...}}`, `{"warning": "..."}`, `{"finished": true}`.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import Any

Command = dict[str, Any]


def main() -> None:
    # The end of the run decides when this ends, not the Ctrl-C or the signal that is meant for training.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"):
        with contextlib.suppress(AttributeError, ValueError):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    commands: queue.Queue[Command] = queue.Queue()
    threading.Thread(target=receive, args=(commands,), daemon=True).start()
    try:
        client = Client(commands.get())
        while client.obey(commands.get()):
            pass
        client.wandb.teardown()
        tell(finished=True)
    except Exception as error:
        tell(warning=f"W&B stopped recording ({brief(error)}); the run goes on, metrics.jsonl has everything")
    os._exit(0)  # not through clean-up at exit, which may wait for what failed


def receive(commands: queue.Queue[Command]) -> None:
    """Take commands off the pipe at once, so that it never fills while W&B is busy."""
    for line in sys.stdin.buffer:
        with contextlib.suppress(ValueError):  # a writer that was killed leaves a torn line
            commands.put(json.loads(line))
    # The end without a `finish` means that the training process died. Uploading has a minute, then is given
    # up: what could not be sent is in the run's folder.
    threading.Timer(60, os._exit, args=(1,)).start()
    commands.put({"do": "finish", "exit_code": 1})


class Client:
    """One W&B run."""

    def __init__(self, start: Command) -> None:
        import wandb

        self.wandb = wandb
        folder = Path(start["dir"])
        settings: dict[str, Any] = {
            "console": "off",
            "silent": True,
            "x_stats_pid": start["pid"],
            "init_timeout": start["init_timeout"],
        }
        known = wandb.Settings.model_fields
        arguments = {
            "dir": str(folder),
            "project": start["project"],
            "name": start["name"],
            "group": start["group"],
            "tags": start["tags"],
            "config": start["config"],
            "id": start["id"],
            "resume": "allow",
            "settings": wandb.Settings(**{k: v for k, v in settings.items() if k in known}),
        }
        mode: Any = start["mode"]
        try:
            self.run = wandb.init(mode=mode, **arguments)
        except Exception as error:
            if mode == "offline":
                raise
            mode = "offline"
            wandb.teardown()  # its service still holds the run that could not be started
            self.run = wandb.init(mode=mode, **arguments)
            later = f"wandb sync {self.run.settings.sync_dir}"
            tell(warning=f"no W&B online ({brief(error)}); recorded offline, send it later: {later}")
        # Online, the server knows how far an earlier incarnation came and refuses to hear those steps again;
        # they are the same ones. Offline every incarnation has a folder of its own, and this is 0.
        self.first_step = self.run.step
        tell(
            run={"id": self.run.id, "mode": mode, "url": self.run.url, "dir": str(self.run.settings.sync_dir)}
        )

    def obey(self, command: Command) -> bool:
        """Carry out one command; False after the last one."""
        do = command["do"]
        if do == "log" and command["step"] >= self.first_step:
            values = dict(command["values"])
            for name, (counts, edges) in command.get("histograms", {}).items():
                values[name] = self.wandb.Histogram(np_histogram=(counts, edges))
            self.run.log(values, step=command["step"])
        elif do == "reference":
            artifact = self.wandb.Artifact(command["name"], type="checkpoint", metadata=command["metadata"])
            # Without checksums: hashing gigabytes again would only repeat the checkpoint's own manifest.
            artifact.add_reference(Path(command["path"]).as_uri(), checksum=False)
            self.run.log_artifact(artifact, aliases=command["aliases"])
        elif do == "summary":
            self.run.summary.update(command["values"])
        elif do == "finish":
            self.run.finish(exit_code=command["exit_code"])
            return False
        return True


def tell(**message: Any) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody may be listening any more
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


if __name__ == "__main__":
    main()
