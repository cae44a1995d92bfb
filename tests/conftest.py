"""Fixtures of the whole suite: a small corpus, a small job, and no network."""

import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"
os.environ.pop("WANDB_API_KEY", None)

# A shell lets what it starts in the background ignore Ctrl-C, and so would processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SMALL_JOB = """\
model: {layers: 2, hidden: 32, heads: 2, dropout: 0.1, positions: rotary, norm: rmsnorm, activation: swiglu}
data: {seq_len: 32, heldout: 0.2, tokenizer: {kind: bytes}}
optimizer: {lr: 3e-3}
schedule: {warmup: 2, steps: 20}
precision: fp32
train: {steps: 20, global_batch: 8, compile: false}
checkpoint: {every: 5}
tracking: {wandb: off, prompt: "the cat"}
"""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 200 short documents."""
    words = [
        "the",
        "a",
        "cat",
        "dog",
        "sat",
        "ran",
        "on",
        "under",
        "mat",
        "house",
        "and",
        "then",
        "it",
        "was",
        "seen",
        "by",
        "who",
    ]
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    lines = (" ".join(draw.choices(words, k=draw.randint(5, 40))) for _ in range(200))
    path.write_text("".join(f'{{"text": "{line}."}}\n' for line in lines))
    return path


@pytest.fixture(scope="session")
def small_job(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A recipe that trains in a second; bytes as tokens, dropout on."""
    path = tmp_path_factory.mktemp("job") / "small.yaml"
    path.write_text(SMALL_JOB.replace("seq_len: 32", f"seq_len: 32, sources: ['{corpus}']"))
    return path


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tests' own cache of stores, shared by all of them and by the processes that they start."""
    path = tmp_path_factory.mktemp("cache")
    os.environ["HEADWAY_CACHE"] = str(path)
    return path


# -- what was proved of layouts, told at the end -----------------------------------------------------------------


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of xdist hands its findings to the one that reports."""
    proof = sys.modules.get("headway.tests.parallel.proof")
    if proof and hasattr(session.config, "workeroutput"):
        session.config.workeroutput["deviations"] = [tuple(found) for found in proof.DEVIATIONS]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """The reporting process collects the findings."""
    if found := getattr(node, "workeroutput", {}).get("deviations"):
        from headway.tests.parallel.proof import DEVIATIONS, Deviation

        DEVIATIONS.extend(Deviation(*each) for each in found)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Layouts, and how far their curves were from those of one process."""
    proof = sys.modules.get("headway.tests.parallel.proof")
    if proof and (lines := proof.summary()):
        terminalreporter.section("curves of layouts beside one process")
        for line in lines:
            terminalreporter.write_line(line)
