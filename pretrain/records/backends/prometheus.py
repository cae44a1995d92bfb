"""An endpoint from which a Prometheus server reads the run's numbers, while it goes.

What is shown: numbers of steps, checkpoints, counts of warnings, this process, and of the job only what the labels
of `headway_run_info` name: no paths, texts or variables of the environment.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import socket
import time
from collections.abc import Mapping
from typing import Any

from headway.pretrain.files import publish
from headway.pretrain.records.backends.base import Gallery, Told

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""Bounds of the histogram of step times."""
COUNTED = {"tokens": "Tokens that were trained on", "joules": "Energy of the steps"}
"""Numbers of a step whose sum is wanted. Like all counters of Prometheus they begin anew with each process."""
EVERYWHERE = ("", "0.0.0.0", "::")


class PrometheusEndpoint:
    """Serves `/metrics` from a thread until the run ends. `prometheus.json` in the run's folder says where, in the
    form that Prometheus reads (`file_sd_configs`).

    Raises:
        OSError: the port is taken, or the address is not this machine's.
    """

    def __init__(self, told: Told) -> None:
        import prometheus_client as client

        self._client, self._registry = client, client.CollectorRegistry()
        client.ProcessCollector(registry=self._registry)
        self._gauges: dict[str, Any] = {}
        self._counters = {
            name: client.Counter(
                f"headway_{name}", f"{text}, since this process began", registry=self._registry
            )
            for name, text in COUNTED.items()
        }
        self._warnings = client.Counter(
            "headway_warnings", "Warnings since this process began", registry=self._registry
        )
        self._seconds = client.Histogram(
            "headway_step_duration_seconds", "Wall time of steps", buckets=SECONDS, registry=self._registry
        )
        client.Info("headway_run", "What runs, and where", registry=self._registry).info(describe(told))
        self._set("running", 1)
        self._set("start_step", told.start_step)
        self._set("step", told.start_step)
        self._set("steps_planned", told.job.train.steps)
        self._file = told.run_dir / "prometheus.json"
        self._serve(told)

    def _serve(self, told: Told) -> None:
        host, port = told.job.tracking.prometheus.host, told.job.tracking.prometheus.port
        try:
            self._server, self._thread = self._client.start_http_server(port, host, self._registry)
        except OSError as error:
            rule = f"{host} port {port} cannot be listened on ({error.strerror or error})"
            raise OSError(f"{rule}; tracking.prometheus.port = 0 takes a port that is free") from None
        name = socket.gethostname() if host in EVERYWHERE else host
        target = (
            f"[{name}]:{self._server.server_port}" if ":" in name else f"{name}:{self._server.server_port}"
        )
        labels = {"run": told.job.run.name}
        with contextlib.suppress(OSError):  # a full disk; the address is said below
            publish(self._file, json.dumps([{"targets": [target], "labels": labels}]) + "\n")
        told.say(f"Prometheus: http://{target}/metrics")

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        self._set("step", step)
        for name, value in values.items():
            if name in self._counters and value >= 0:
                self._counters[name].inc(value)
            elif name == "step_seconds":
                self._seconds.observe(value)
                self._set("last_step_timestamp_seconds", time.time())
            if name != "step":
                self._set(name, value)

    def event(self, kind: str, step: int, fields: Mapping[str, Any]) -> None:
        if kind == "warning":
            self._warnings.inc()
        elif kind == "checkpoint":
            self._set("checkpoint_step", step)
            self._set("checkpoint_timestamp_seconds", time.time())

    def histograms(self, step: int, histograms: Mapping[str, tuple[list[float], list[float]]]) -> None:
        """Nothing: distributions of gradients are for charts over steps."""

    def show(self, step: int, gallery: Gallery) -> None:
        """Nothing: it takes numbers alone."""

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        self._set("running", 0)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._file.unlink(missing_ok=True)

    def _set(self, name: str, value: float) -> None:
        """The present value under `headway_NAME`; what Prometheus's names cannot hold becomes a low line."""
        key = f"headway_{re.sub(r'[^a-zA-Z0-9_]', '_', name)}"
        if key not in self._gauges:
            text = name.replace("_", " ")
            try:
                self._gauges[key] = self._client.Gauge(key, text, registry=self._registry)
            except ValueError:  # a counter has the name: of `tokens` the last step's stand beside their sum
                self._gauges[key] = self._client.Gauge(f"{key}_last", text, registry=self._registry)
        self._gauges[key].set(value if math.isfinite(value) else math.nan)


def describe(told: Told) -> dict[str, str]:
    """The labels of a run."""
    job, place = told.job, told.place
    layout = " x ".join(f"{axis} {size}" for axis, size in place.get("layout", {}).items())
    return {
        "run": job.run.name,
        "family": job.model.family,
        "objective": job.objective.name,
        "engine": job.parallel.engine,
        "precision": str(place.get("precision", job.precision)),
        "parameters": str(place.get("parameters", "")),
        "world": str(place.get("world", 1)),
        "hosts": str(max(1, len(place.get("hosts", {})))),
        "layout": layout,
        "device": str(place.get("device", "")),
        "launcher": str(place.get("launcher", "")),
        "incarnation": str(place.get("incarnation", 0)),
    }
