"""A student's maps beside its teacher's, as a run draws them: they are what the loss compared."""

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from headway.kernels.map_distillation import map_distillation_loss
from headway.launch import run
from headway.launch.compare import compare
from headway.launch.samples import Shown, beginning, show
from headway.pretrain.objectives.distill.match import LEARNED
from headway.pretrain.records.map_pairs import divergences
from headway.tests.pretrain.records.test_report import Page, squeeze

SHORT = ["train.steps=2", "train.compile=false", "precision=fp32", "train.global_batch=4", "schedule.warmup=1",
         "tracking.wandb=off", "tracking.prompt=the cat", "train.eval_every=0"]  # fmt: skip
TEXT = ["data.seq_len=32", "data.heldout=0.2", "data.tokenizer={kind: bytes}"]
RECIPES = {
    "gpt": ("gpt/tiny", TEXT),
    "bert": ("bert/tiny", TEXT),
    "vit": ("vit/tiny", []),
    "t5": ("t5/tiny", TEXT),
}
TEACHER = ["model.layers=4", "model.hidden=32", "model.heads=4"]
STUDENT = ["model.layers=2", "model.hidden=16", "model.heads=2"]
ATTENTION = ["objective.distill.attention.weight=1"]


@pytest.fixture(scope="module")
def train(corpus, tmp_path_factory):
    """Train a small model of a family; teachers are trained once."""
    folder = tmp_path_factory.mktemp("runs")

    def start(family: str, name: str, *sets: str) -> Path:
        recipe, more = RECIPES[family]
        sources = [f"data.sources=['{corpus}']"] if more is TEXT else []
        if not (folder / name).exists():
            given = [*SHORT, *more, *sources, f"run.dir={folder}", f"run.name={name}", *sets]
            run.train([recipe], given)
        return folder / name

    return start


@pytest.fixture
def taught(train):
    """A student of a family's teacher: its run folder."""

    def start(family: str, name: str, *sets: str) -> Path:
        teacher = train(
            family, f"{family}-teacher", *TEACHER, *(["model.decoder_layers=4"] if family == "t5" else [])
        )
        return train(family, name, *STUDENT, f"objective.distill.teacher={teacher}", *sets)

    return start


def look(folder: Path) -> tuple[Shown, float | None]:
    """What a run shows, and how far the maps of its sample are apart by the loss, if that compares maps."""
    with ExitStack() as stack:
        parts = run.restored(str(folder), [], stack)
        parts.engine.objective.eval()
        batch = beginning(parts)
        shown = show(parts)
        found = next(parts.engine.teacher.teach([batch], None))
        with torch.no_grad():
            metrics = parts.engine.objective(batch | found).metrics
        suffix = ".0" if parts.job.model.family == "t5" else ""
        told = metrics.get(f"{LEARNED}attention{suffix}")
        return shown, None if told is None else float(told.sum / told.over)


def page_of(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("family", "name", "sets", "several"),
    [
        ("gpt", "gpt-student", [], True),
        pytest.param(
            "gpt",
            "gpt-window",
            ["model.attention.mechanism=window", "model.attention.window=6"],
            True,
            marks=pytest.mark.matrix,
        ),
        pytest.param(
            "bert",
            "bert-student",
            ["objective.distill.attention.heads=[3,1]"],
            False,
            marks=pytest.mark.matrix,
        ),
        pytest.param("vit", "vit-student", [], True, marks=pytest.mark.matrix),
        pytest.param("t5", "t5-student", ["model.decoder_layers=2"], True, marks=pytest.mark.matrix),
    ],
)
def test_the_report_shows_what_the_loss_compared(taught, family, name, sets, several):
    folder = taught(family, name, *ATTENTION, *sets)
    shown, loss = look(folder)
    pairs = shown.pairs
    assert pairs.layers == [(0, 1), (1, 3)]
    assert pairs.heads == ([[0, 1], [2, 3]] if several else [[3], [1]])
    assert pairs.learned
    np.testing.assert_array_equal(pairs.student, shown.maps.weights)
    kl, js = divergences(pairs.teacher, pairs.student, pairs.counted)
    # Both are of fp32 maps: a row's KL errs by a rounding, 6e-8, of logarithms of up to 4, on either side.
    assert kl.mean() == pytest.approx(loss, rel=1e-6, abs=5e-7)
    assert ((js >= 0) & (js <= kl)).all()
    page = page_of(folder)
    assert len([a for a in page.all("figure") if a.get("class") == "pair"]) == 4
    said = squeeze(page.text)
    assert "Student's layer 2, teacher's layer 4" in said
    assert ("their mean" in said) is several
    assert "What is learned from the teacher" in said
    assert "Attention maps" in said
    assert ("those of the encoder" in said) is (family == "t5")


def test_divergences_are_those_of_the_kernels_on_the_same_maps(taught):
    pairs = look(taught("gpt", "gpt-student", *ATTENTION))[0].pairs
    eye = torch.eye(len(pairs.tokens), dtype=torch.float64).expand(2, 2, -1, -1)
    p, q = (torch.from_numpy(maps.astype(np.float64)).log() for maps in (pairs.teacher, pairs.student))
    p, q = (torch.where(torch.isinf(x), 0, x) for x in (p, q))  # above the diagonal, which is not seen
    for loss, found in zip(
        ("kl", "js"), divergences(pairs.teacher, pairs.student, pairs.counted), strict=True
    ):
        expected = map_distillation_loss(
            p, eye, q, eye, loss=loss, causal=True, scale=1.0, kernel="reference"
        )
        assert found.mean() == pytest.approx(expected.item(), rel=1e-9)


def test_maps_that_are_not_learned_are_paired_evenly(taught):
    folder = taught("gpt", "gpt-soft", "objective.distill.logits.weight=1")
    shown, loss = look(folder)
    assert loss is None
    assert shown.pairs.layers == [(0, 1), (1, 3)]
    assert "Maps were no part of the loss." in squeeze(page_of(folder).text)


@pytest.mark.parametrize(
    ("name", "sets", "sentence"),
    [
        ("gpt-linear", ["model.attention.mechanism=gla"], "The student has no attention maps"),
        (
            "gpt-mixed",
            ["model.attention.pattern=[gla, dense]"],
            "student's layers without attention maps are left out: 1",
        ),
        ("gpt-three", ["model.layers=3"], "3 layers cannot be spread evenly over the teacher's 4"),
        ("gpt-differential", ["model.attention.mechanism=differential"], "the student's 2 heads have 4 maps"),
        (
            "gpt-heads",
            ["model.hidden=24", "model.heads=3"],
            "the teacher's 4 heads are no multiple of the student's 3",
        ),
    ],
)
def test_what_cannot_be_shown_is_said(taught, name, sets, sentence):
    folder = taught("gpt", name, "objective.distill.logits.weight=1", *sets)
    page = page_of(folder)
    assert sentence in squeeze(page.text)
    figures = [a["id"] for a in page.all("figure") if a.get("class") == "pair"]
    assert figures == (["pair-1-1", "pair-1-2"] if name == "gpt-mixed" else [])


def test_without_a_teacher_there_is_nothing_to_compare(train):
    folder = train("gpt", "gpt-teacher", *TEACHER)
    with ExitStack() as stack:
        parts = run.restored(str(folder), [], stack)
        assert compare(parts, parts.engine.objective, beginning(parts), None) is None
    assert "Teacher and student" not in page_of(folder).text
