"""`headway data ledger` on runs as users start, kill and change them."""

import json

import pytest
import torch
from typer.testing import CliRunner

from headway.launch import ledger, run
from headway.launch.cli import app
from headway.parallel import mesh
from headway.pretrain.data.stream import SampleStream
from headway.pretrain.errors import JobError, LedgerError
from headway.pretrain.records.metrics import read_metrics


@pytest.fixture
def train(small_job, tmp_path):
    """Train the small job in this process; returns the run's folder."""

    def start(*sets):
        run.train([str(small_job)], [f"run.dir={tmp_path}", "run.name=run", *sets])
        return tmp_path / "run"

    return start


def prove(folder, *options):
    return CliRunner().invoke(app, ["data", "ledger", str(folder), *options])


def change(folder, step, **values):
    """Change the record of a step."""
    path = folder / "ledger.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[step - 1] |= values
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def die_at_step_13(monkeypatch):
    """The batch of a later step cannot be made, as if the process were killed."""
    make, calls = SampleStream.batch, []

    def batch(*args, **kwargs):
        calls.append(args)
        if len(calls) > 12:
            raise KeyboardInterrupt
        return make(*args, **kwargs)

    monkeypatch.setattr(SampleStream, "batch", batch)


def test_a_killed_run_is_proved_and_a_changed_record_is_named(train, monkeypatch, corpus):
    with monkeypatch.context() as patch:
        die_at_step_13(patch)
        with pytest.raises(KeyboardInterrupt):
            train()
    folder = train("parallel.micro_batch=4")
    proved = prove(folder)
    assert proved.exit_code == 0, proved.exception
    assert "20 steps used 160 samples, begun or gone on with at step 1, 11" in proved.output
    assert "exactly once an epoch" in proved.output
    assert corpus.name in proved.output
    records = read_metrics(folder / "ledger.jsonl")
    assert [row["step"] for row in records] == list(range(1, 21))
    change(folder, 7, digest=records[7]["digest"], draws=records[7]["draws"])
    with pytest.raises(LedgerError, match=r"^step 7 .*lost were draws 48 to 55.* whose turn comes later"):
        ledger.show(str(folder), open_data=False)
    assert LedgerError.exit_code == 70


def test_a_ledger_that_ends_too_early_or_disagrees_with_a_checkpoint_is_named(train):
    folder = train("train.steps=10")
    lines = (folder / "ledger.jsonl").read_text().splitlines(keepends=True)
    (folder / "ledger.jsonl").write_text("".join(lines[:8]))
    with pytest.raises(LedgerError, match=r"step 9 has no record in ledger.jsonl, which ends before metrics"):
        ledger.show(str(folder), open_data=False)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(LedgerError, match=r"step 9 has no record .*step_00000010 was saved"):
        ledger.show(str(folder), open_data=False)
    (folder / "ledger.jsonl").unlink()
    with pytest.raises(LedgerError, match=r"has no ledger.jsonl"):
        ledger.show(str(folder), open_data=False)
    with pytest.raises(JobError, match=r"no run folder"):
        ledger.show(str(folder.parent / "nothing"), open_data=False)


def test_a_blend_and_a_batch_that_change_on_the_way_are_proved(train, corpus, tmp_path):
    second = tmp_path / "second.jsonl"
    second.write_text(corpus.read_text()[: corpus.stat().st_size // 2].rpartition("\n")[0] + "\n")
    train("train.steps=5")
    both = f"data.sources=[{{path: {corpus}, weight: 1}}, {{path: {second}, weight: 3}}]"
    train(both, "train.steps=10")
    folder = train(both, "train.global_batch=16")
    proved = prove(folder)
    assert proved.exit_code == 0, proved.exception
    assert "20 steps used 240 samples, begun or gone on with at step 1, 6, 11" in proved.output
    assert second.name in proved.output


@pytest.mark.slow
def test_images_and_a_ramp_are_proved(tmp_path):
    pytest.importorskip("sklearn")
    sets = ["train.steps=5", "train.global_batch=12", "train.compile=false", "tracking.wandb=off"]
    sets += [
        "train.ramp={start: 4, increment: 4, samples: 20}",
        "model.family=vit",
        "objective.name=classify",
    ]
    sets += ["model={layers: 1, hidden: 16, heads: 2, vision: {patch: 4}}", "data.sources=['sklearn:digits']"]
    sets += ["data.images={size: 8, channels: 1}", f"run.dir={tmp_path}", "run.name=digits", "precision=fp32"]
    run.train([], sets)
    assert prove(tmp_path / "digits").exit_code == 0


def part(rank, world, recipe, folder, sets, layout):
    """A rank of a run: trains on until the run's steps are done."""
    import os

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.manual_seed(rank)  # nothing may depend on it
    stop, mesh.stop = mesh.stop, lambda: None  # the pool ends its groups itself
    try:
        run.train([recipe], [f"run.dir={folder}", "run.name=run", "precision=fp64", *sets, *layout])
    finally:
        mesh.stop = stop
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            del os.environ[name]


@pytest.mark.matrix
def test_a_run_that_goes_on_at_other_layouts_is_proved(pool, small_job, tmp_path):
    sets = ["train.global_batch=12", "checkpoint.every=0"]
    lives = [
        (2, 3, ["parallel.replicate=2", "parallel.shard=1"]),
        (3, 5, ["parallel.shard=3", "parallel.micro_batch=2"]),
        (4, 7, ["parallel.replicate=2", "parallel.shard=2"]),
        (1, 9, []),
    ]
    for ranks, steps, layout in lives:
        settings = {"recipe": str(small_job), "folder": str(tmp_path), "layout": layout}
        pool(part, ranks=ranks, sets=[*sets, f"train.steps={steps}"], **settings)
    proved = prove(tmp_path / "run")
    assert proved.exit_code == 0, proved.exception
    assert "9 steps used 108 samples, begun or gone on with at step 1, 4, 6, 8" in proved.output
