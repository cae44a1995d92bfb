"""What W&B costs a training step: hand-over of a step, and a small run's steps with and without it.

    python tests/benchmarks/bench_tracking.py [--rounds 3] [--steps 300]

Servers: none (offline), one that answers, one that refuses everything (500), one that accepts and never answers.
Prints of the hand-over of a step to `Records`, in microseconds: CPU time of the training thread at the median; wall
time at the median, the 99th percentile and the longest (on a busy machine those are the scheduler's). Then the ratio of
the median time of a step of about 10 ms with W&B to one without. Rounds of the kinds are interleaved. The client and
its server share the machine with training, as they do in a run.
"""

from __future__ import annotations

import argparse
import io
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from headway.pretrain.config import Job
from headway.pretrain.records.records import Records
from headway.tests.pretrain.records.backends.wandb_server import KEY, WandbServer

KINDS = ("off", "offline", "answers", "refuses", "silent")
WORK = 3
"""Products of 512 x 512 in a step: about 10 ms of one core."""


@contextmanager
def wandb_server(kind: str) -> Iterator[str]:
    """The mode of the tracker; its server stands in the environment."""
    os.environ["WANDB_API_KEY"] = KEY
    if kind in ("off", "offline"):
        yield kind
    elif kind == "silent":
        with socket.create_server(("127.0.0.1", 0)) as server:
            os.environ["WANDB_BASE_URL"] = f"http://127.0.0.1:{server.getsockname()[1]}"
            yield "online"
    else:
        with WandbServer() as answering:
            answering.status = 500 if kind == "refuses" else 0
            os.environ["WANDB_BASE_URL"] = answering.url
            yield "online"


def run(kind: str, steps: int) -> tuple[list[float], list[float], float]:
    """Seconds of each hand-over, of the CPU in it, and of a step at the median, its work included."""
    a = torch.randn(512, 512)
    wall, cpu, whole = [], [], []
    with tempfile.TemporaryDirectory() as folder, wandb_server(kind) as mode:
        records = Records(Path(folder) / "run", Job(), mode=mode, stream=io.StringIO())
        for backend in records.backends:
            backend.client.timeout = 1.0  # type: ignore[attr-defined]  # the end is not what is measured
        for step in range(1, steps + 1):
            begin = time.perf_counter()
            for _ in range(WORK):
                a @ a
            start, used = time.perf_counter(), time.thread_time()
            records.step({"step": step, "loss": 1 / step, "lr": 1e-3, "grad_norm": 1.0, "tokens": 512})
            cpu.append(time.thread_time() - used)
            wall.append(time.perf_counter() - start)
            whole.append(time.perf_counter() - begin)
        records.close()
    return wall, cpu, statistics.median(whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[tuple[list[float], list[float], float]]] = {kind: [] for kind in KINDS}
    for _ in range(options.rounds):
        for kind, rounds in found.items():
            rounds.append(run(kind, options.steps))
    bare = statistics.median(whole for _, _, whole in found["off"])
    print(f"{'W&B':<10}{'cpu us':>8}{'wall us':>9}{'p99':>8}{'longest':>9}{'step':>8}")
    for kind, rounds in found.items():
        wall, cpu = (sorted(1e6 * t for part in rounds for t in part[i]) for i in (0, 1))
        p99, whole = wall[int(0.99 * len(wall))], statistics.median(whole for _, _, whole in rounds)
        times = f"{statistics.median(cpu):>8.0f}{statistics.median(wall):>9.0f}{p99:>8.0f}{wall[-1]:>9.0f}"
        print(f"{kind:<10}{times}{whole / bare:>8.3f}")


if __name__ == "__main__":
    main()
