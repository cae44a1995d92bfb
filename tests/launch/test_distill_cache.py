"""`headway distill cache` and runs that read what it wrote, as users start them."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from headway.launch import distill, run
from headway.launch.cli import app
from headway.pretrain.data.stream import SampleStream
from headway.pretrain.data.teacher_cache import TeacherCache, writer
from headway.pretrain.errors import Interrupted, JobError
from headway.pretrain.inert import refuse_inert
from headway.pretrain.recipe import resolve
from headway.pretrain.records.metrics import read_metrics
from headway.tests.chosen import first
from headway.tests.launch.test_families import RECIPES, SHORT, SMALL, TEXT
from headway.tests.launch.test_train import HEADWAY, losses, weights

LARGE = ["model.hidden=48", "model.heads=4", "model.layers=4"]
D = "objective.distill"
LEARNS = [
    f"{D}.logits={{weight: 0.5, top_k: 7, temperature: 2.0}}",
    f"{D}.attention.weight=1",
    f"{D}.states.weight=0.3",
    f"{D}.contrast={{weight: 0.1, queue: 20}}",
]
STEPS = 4


@pytest.fixture(scope="module")
def job(small_job, corpus, tmp_path_factory):
    """A job with a teacher, of four steps; all folders are beside each other."""
    folder = tmp_path_factory.mktemp("distil")
    run.train([str(small_job)], [f"run.dir={folder}", "run.name=teacher", "train.steps=3", *LARGE])
    sets = [f"run.dir={folder}", f"train.steps={STEPS}", "checkpoint.every=2", *LEARNS]
    return Started([str(small_job)], folder, sets)


class Started:
    """A recipe, the settings of its students, and the folder of runs and caches."""

    def __init__(self, recipes, folder, sets):
        self.recipes, self.folder, self.sets = recipes, folder, sets
        self.teacher = f"{D}.teacher={folder}/teacher"

    def cache(self, name: str, *sets: str, dtype: str = "auto") -> Path:
        distill.cache(self.recipes, [*self.sets, self.teacher, *sets], str(self.folder / name), dtype)
        return self.folder / name

    def train(self, name: str, *sets: str) -> Path:
        run.train(self.recipes, [*self.sets, f"run.name={name}", *sets])
        return self.folder / name


@pytest.fixture(scope="module")
def kept(job):
    return job.cache("kept")


@pytest.fixture(scope="module")
def live(job):
    """A run with its teacher beside it."""
    return job.train("live", job.teacher)


def assert_same(one: Path, other: Path, step: int = STEPS) -> None:
    """Two runs have the same bits, in every step and at the end."""
    for ours, theirs in zip(read_metrics(one), read_metrics(other), strict=True):
        for name in ("loss", "grad_norm", "soft_loss", "learned/attention", "learned/states", "contrast"):
            assert ours.get(name) == theirs.get(name), name
    here, there = weights(one, step), weights(other, step)
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_a_run_with_a_cache_has_the_bits_of_one_with_its_teacher(job, kept, live):
    cached = job.train("cached", f"{D}.cache={kept}")
    assert_same(cached, live)
    assert read_metrics(live)[0]["contrast"] > 0
    summary = json.loads((cached / "summary.json").read_text())
    assert summary["heldout_loss"] == json.loads((live / "summary.json").read_text())["heldout_loss"]
    assert not [name for name in summary if "learned" in name or "soft" in name]


def test_an_interrupted_run_with_a_cache_goes_on_with_the_same_bits(job, kept, live, monkeypatch):
    make, calls = SampleStream.batch, []

    def die_at_four(*args, **kwargs):
        calls.append(args)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return make(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SampleStream, "batch", die_at_four)
        with pytest.raises(KeyboardInterrupt):
            job.train("broken", f"{D}.cache={kept}")
    assert (job.folder / "broken/checkpoints/LATEST").read_text().strip() == "step_00000002"
    assert_same(job.train("broken", f"{D}.cache={kept}"), live)


@pytest.mark.matrix
def test_soft_targets_of_all_words_need_the_teachers_head_beside(job):
    sets = [f"{D}.logits.top_k=null", f"{D}.init=[1, 3]", "model.hidden=48", "model.heads=4"]
    kept = job.cache("words", *sets)
    assert "taught.final" in TeacherCache.open(kept).fields
    beside = job.train("words-cached", *sets, f"{D}.cache={kept}", job.teacher)
    assert_same(beside, job.train("words-live", *sets, job.teacher))
    with pytest.raises(
        JobError, match=rf"^{D}\.init = \[1, 3\]: .*teacher, which is not given; a cache has none"
    ):
        job.train("none", *sets, f"{D}.cache={kept}")
    with pytest.raises(
        JobError, match=rf"^{D}\.logits\.top_k = None: .*head, which a cache does not hold.* 64"
    ):
        job.train("none", *sets, f"{D}.init=null", f"{D}.cache={kept}")


def rows(cache: Path) -> dict[str, torch.Tensor]:
    opened = TeacherCache.open(cache)
    return opened.read(opened._index.keys)


def test_an_interrupted_cache_goes_on_where_it_was(job, kept, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_BYTES", 1 << 16)  # a row or two
    write, calls = distill.Maker.write, []

    def die_at_three(self, *args):
        calls.append(len(calls))
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(distill.Maker, "write", die_at_three)
        with pytest.raises(KeyboardInterrupt):
            job.cache("broken-cache")
    with monkeypatch.context() as patch:  # a request to stop is heeded after a step
        patch.setattr(distill.Maker, "write", lambda self, *args: calls.append("more") or write(self, *args))
        patch.setattr(distill.StopRequest, "__enter__", lambda self: setattr(self, "asked", True) or self)
        with pytest.raises(Interrupted, match="kept step 3 of 4; start again to go on"):
            job.cache("broken-cache")
    assert calls[3:] == ["more"]
    found, expected = rows(job.cache("broken-cache")), rows(kept)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_is_stored_follows_the_dtype(job, kept, live):
    half = TeacherCache.open(job.cache("half", dtype="bf16"))
    whole = TeacherCache.open(kept)
    assert {str(field.dtype) for field in whole.fields.values()} == {"torch.float32", "torch.int32"}
    narrow = {name for name, field in half.fields.items() if field.dtype == torch.bfloat16}
    assert narrow == {f"taught.0.{layer}.{what}" for layer in (1, 3) for what in ("q", "k", "states")}
    for name, value in rows(half.folder).items():
        torch.testing.assert_close(value, rows(kept)[name].to(value.dtype), rtol=0, atol=0)
    assert_finite = job.train("halved", f"{D}.cache={half.folder}")
    assert losses(assert_finite) == pytest.approx(losses(live), rel=1e-3)


REFUSED = [
    (["train.seed=1"], r"train\.seed = 1: .*with another train\.seed \(0\)"),
    (["data.seq_len=16"], r"data\.sources = .*was made from other data"),
    (["data.documents=isolate", "model.attention.kernel=auto"], r"data\.documents = 'isolate': .*with another"),
    (["objective.infill.rate=0.5"], r"objective\.infill = .*with another objective\.infill"),
    (["train.steps=5", "schedule.steps=5"], r"train\.steps = 5: draws 40 samples.* first 32.* Nearest legal choice: 4"),
    ([f"{D}.logits.top_k=5"], rf"{D}\.logits\.top_k = 5: .* \(7\)"),
    ([f"{D}.logits.temperature=1"], rf"{D}\.logits\.temperature = 1\.0: .* \(2\.0\)"),
    ([f"{D}.attention.layers=[0, 1]"], rf"{D}\.attention = 'weight 1': needs taught\.0\.0\.q, which the cache"),
    ([f"{D}.relations.weight=1"], rf"{D}\.relations = 'weight 1': needs taught\.0\.3\.values, which the cache"),
    ([f"{D}.final.weight=1"], rf"{D}\.final = 'weight 1': needs taught\.last, which"),
]  # fmt: skip


@pytest.mark.parametrize(("sets", "message"), REFUSED)
def test_a_cache_of_something_else_is_refused_before_the_first_step(job, kept, sets, message):
    with pytest.raises(JobError, match=message):
        job.train("refused", f"{D}.cache={kept}", *sets)
    assert not (job.folder / "refused").exists()


def test_a_cache_of_another_teacher_tokenizer_or_text_is_refused(job, kept, corpus, tmp_path, monkeypatch):
    run.train(job.recipes, [f"run.dir={tmp_path}", "run.name=other", "train.steps=3", "train.seed=5", *LARGE])
    with pytest.raises(JobError, match=rf"{D}\.teacher = '\w+': the cache .* was made by another teacher"):
        job.train("refused", f"{D}.cache={kept}", f"{D}.teacher={tmp_path}/other")
    tokenizer = "data.tokenizer={kind: sentencepiece, vocab: 300}"
    with pytest.raises(JobError, match=r"data\.tokenizer = '\w+': .*with another tokenizer"):
        job.train("refused", f"{D}.cache={kept}", tokenizer)
    copied = tmp_path / corpus.name
    shutil.copy(corpus, copied)
    local = Started(job.recipes, tmp_path, [s for s in job.sets if not s.startswith("run.dir")])
    local.sets += [f"run.dir={tmp_path}", f"data.sources=['{copied}']"]
    local.teacher = job.teacher
    small = local.cache("kept")
    copied.write_text(copied.read_text().replace("cat", "cow"))  # as many tokens
    with pytest.raises(JobError, match=r"data_fingerprint = '\w+': .*was made from other data"):
        local.train("refused", f"{D}.cache={small}")


def test_what_cannot_be_cached_says_why(job, kept, tmp_path):
    def refuse(message: str, *sets: str, out: str = "never", dtype: str = "auto") -> None:
        with pytest.raises(JobError, match=message):
            job.cache(out, *sets, dtype=dtype)

    refuse(rf"^{D}\.teacher = None: there is neither a teacher nor a cache of one", f"{D}.teacher=null")
    refuse(r"^--out = .*exists already: delete it", out="kept")
    refuse(r"^--dtype = 'fp16': is one of auto, bf16, fp32, fp64", dtype="fp16")
    with pytest.raises(
        JobError, match=r"^parallel\.tensor = 2: .*whole rows.*parallel\.teacher\.tensor\. Any"
    ):
        distill.check(job.recipes, [*job.sets, job.teacher, "parallel.tensor=2"], "never", "auto", 2)
    with pytest.raises(JobError, match=rf"^{D}\.cache = .*no cache can be read there.*manifest\.json"):
        job.train("refused", f"{D}.cache={tmp_path}")
    assert not (job.folder / "never").exists()


@pytest.mark.parametrize("setting", ["parallel.teacher.tensor=1", f"{D}.precision=fp32"])
def test_settings_of_a_teacher_beside_have_no_effect_with_a_cache(job, kept, setting):
    with pytest.raises(JobError, match="no effect in this job: no teacher computes here"):
        refuse_inert(resolve(job.recipes, [*job.sets, f"{D}.cache={kept}", job.teacher, setting]))
    refuse_inert(resolve(job.recipes, [*job.sets, job.teacher, setting]))


FAMILIES = {
    "bert/tiny": [f"{D}.logits={{weight: 0.5, top_k: 5}}", f"{D}.attention.weight=1"],
    "vit/tiny": [f"{D}.logits.weight=0.5", f"{D}.states.weight=1"],
}


@pytest.mark.parametrize("name", first(1, FAMILIES))
def test_masks_and_images_are_read_from_a_cache_too(name, corpus, tmp_path):
    base = [*SHORT, *SMALL, *RECIPES[name][2], f"run.dir={tmp_path}", "train.steps=2"]
    base += [f"data.sources=['{corpus}']"] if TEXT[0] in base else []
    run.train([name], [*base, "run.name=teacher", "train.seed=3"])
    students = Started([name], tmp_path, [*base, *FAMILIES[name]])
    cached = students.train("cached", f"{D}.cache={students.cache('kept')}")
    assert_same(cached, students.train("live", students.teacher), step=2)


@pytest.mark.matrix
def test_the_command_line_writes_a_cache_on_two_ranks(job, kept):
    out = job.folder / "two"
    sets = [word for one in (*job.sets, job.teacher) for word in ("--set", one)]
    command = [*HEADWAY, "distill", "cache", *job.recipes, "--out", str(out), *sets, "--nproc", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "32 samples; " in done.stdout
    assert "is complete" in done.stdout
    found, expected = rows(out), rows(kept)
    for name in expected:  # each rank had half of the rows, which products may sum in another order
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_help_says_what_the_cache_is_for():
    said = CliRunner().invoke(app, ["distill", "cache", "--help"]).output
    for word in ("--out", "--dtype", "--nproc", "objective.distill.cache=DIR", "parallel.teacher"):
        assert word in said
