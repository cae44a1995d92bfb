"""docs/clusters.md, followed literally: its commands, in their order, on the virtual cluster."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headway.launch.cli import app
from headway.launch.slurm import jobs
from headway.pretrain.records.metrics import read_metrics
from headway.tests.launch.slurm.cluster import poll
from headway.tests.launch.slurm.launched import Desk, Run

PAGE = Path(__file__).parents[3] / "docs/clusters.md"


def blocks(title: str) -> list[str]:
    """What is indented under a title, block by block."""
    text = PAGE.read_text().split(f"## {title}")[1].split("\n## ")[0]
    found = re.findall(r"(?:^    .*\n(?:\n(?=    ))?)+", text, re.MULTILINE)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE).strip() for block in found]


def commands(title: str) -> list[list[str]]:
    """Arguments of `headway`, in order."""
    lines = [line for block in blocks(title) for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("headway ")]


def test_its_commands_are_what_the_command_line_has(tmp_path, monkeypatch):
    """Each makes a script, with the cluster's file as the page has it."""
    monkeypatch.chdir(tmp_path)
    file = next(block for block in blocks("Slurm, step by step") if block.startswith("# my_cluster.yaml"))
    Path("my_cluster.yaml").write_text(file.partition("\n\nheadway")[0])
    tried = [words for words in commands("Slurm, step by step") if words[:2] == ["launch", "slurm"]]
    assert len(tried) > 4
    for words in tried:
        said = CliRunner().invoke(app, [*words, "--dry-run"], catch_exceptions=False)
        assert said.exit_code == 0
        assert said.output.startswith("#!/usr/bin/env bash")


@pytest.mark.slurm
@pytest.mark.long
def test_it_works_when_it_is_followed(desk, cluster):
    """`gpt/tiny` as it is, its corpus and tokenizer among it; a person waits until there is something to see."""
    place: Desk = desk(pace=0)
    seen = 0
    for words in commands("Slurm, step by step"):
        if "--cluster" in words:
            continue  # of GPUs; see above
        said = place.headway(*words)
        run = place.folder / ("runs/rates-0" if "--sweep" in words else "runs/gpt-tiny")
        if words[:2] == ["launch", "slurm"] and "--dry-run" not in words:
            before, seen = seen if "--sweep" not in words else 0, 0
            first = Run(cluster, place.folder / "runs" / ("rates" if "--sweep" in words else "gpt-tiny"))
            poll(lambda run=run, before=before: step(run) > before + 2, 400, first.log)
        elif words[:2] == ["launch", "cancel"]:
            cluster.wait(jobs.submitted(run)[-1], {"COMPLETED", "FAILED", "CANCELLED"}, 60)
            seen = step(run)
            assert (run / "checkpoints/LATEST").read_text().strip() == f"step_{seen:08d}"
        elif words[0] == "watch":
            assert "gpt-tiny" in said
            assert "running" in said
        elif words[:2] == ["launch", "status"]:
            assert "RUNNING" in said
    place.headway("launch", "cancel", "runs/gpt-tiny", "--now")
    place.headway("launch", "cancel", "runs/rates", "--now")


def step(run: Path) -> int:
    """The newest step that is recorded."""
    rows = read_metrics(run)
    return rows[-1]["step"] if rows else 0
