"""From the command to the end of the first step, as a user types it: one rank, and more on this machine.

    python tests/benchmarks/bench_startup.py [--ranks 1 2 8] [--rounds 3]

The corpus and its token store are there already (the first run makes them and is not counted). Prints medians in
seconds, and what a bare `import torch` takes on as many processes at once.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = """\
model: {layers: 4, hidden: 128, heads: 4}
data: {seq_len: 128, sources: ['stdlib:'], tokenizer: {kind: bytes}}
schedule: {warmup: 1}
precision: fp32
train: {steps: 2, global_batch: 8, compile: false, eval_every: 0}
checkpoint: {every: 0}
tracking: {wandb: off}
"""


def first_step(recipe: Path, ranks: int) -> float:
    """Seconds until the line of the first step."""
    with tempfile.TemporaryDirectory() as folder:
        start, seconds = time.perf_counter(), None
        command = [Path(sys.executable).with_name("headway"), "train", recipe, "--nproc", str(ranks)]
        command += ["--set", f"run.dir={folder}"]
        unbuffered = os.environ | {"PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=unbuffered) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if seconds is None and line.startswith("step 1/"):
                    seconds = time.perf_counter() - start
        assert process.returncode == 0
        assert seconds is not None
        return seconds


def imports(processes: int) -> float:
    """Seconds of so many processes that import torch side by side."""
    start = time.perf_counter()
    running = [subprocess.Popen([sys.executable, "-c", "import torch"]) for _ in range(processes)]
    for process in running:
        process.wait()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "startup.yaml"
        recipe.write_text(RECIPE)
        first_step(recipe, 1)
        for ranks in args.ranks:
            times = [(first_step(recipe, ranks), imports(ranks)) for _ in range(args.rounds)]
            ours, bare = (statistics.median(each) for each in zip(*times, strict=True))
            print(
                f"  {ranks} rank(s): first step after {ours:.1f} s; importing torch alone {bare:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
