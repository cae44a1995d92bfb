"""From a job to its samples, objective by objective: lengths, special tokens, held-out samples, notes, faults."""

import json

import numpy as np
import pytest
import torch

from headway.pretrain.config import Job
from headway.pretrain.data.dataset import open_dataset
from headway.pretrain.data.heldout import HeldoutRows
from headway.pretrain.data.images.samples import ImageSamples
from headway.pretrain.data.segments import SegmentPairs
from headway.pretrain.data.text_pairs import TextPairs
from headway.pretrain.data.token_rows import TokenRows
from headway.pretrain.errors import DataError, JobError
from headway.pretrain.evaluate import heldout_rows
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.objectives import build_objective
from headway.tests.parallel.family_cases import rows_of

BYTES = 260  # of the bytes' tokenizer: 256, the separator, three that are unused
SMALL = {"layers": 1, "hidden": 24, "heads": 3}
NEXT = {"name": "masked", "masking": {"pairs": "next"}}
WORDS = {"name": "masked", "masking": {"unit": "word"}}


def job(corpus, family="gpt", objective="causal", heldout=0.2, seq_len=32, model=None, **data):
    objective = {"name": objective} if isinstance(objective, str) else objective
    data = {
        "sources": str(corpus),
        "seq_len": seq_len,
        "heldout": heldout,
        "tokenizer": {"kind": "bytes"},
    } | data
    return Job.model_validate(
        {"model": SMALL | {"family": family} | (model or {}), "objective": objective, "data": data}
    )


def images(objective="classify", **settings):
    data = {"sources": "sklearn:digits", "heldout": 0.1, "images": {"size": 8, "channels": 1}} | settings
    model = SMALL | {"family": "vit", "vision": {"patch": 4}}
    return Job.model_validate({"model": model, "objective": {"name": objective}, "data": data})


@pytest.fixture
def pairs(tmp_path):
    """A file of 200 pairs of texts; ten are too long for a row of 32 bytes."""
    lines = [
        {"text": f"number {i}" + " and so on" * 5 * (i % 20 == 0), "target": f"Zahl {i}"} for i in range(200)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


CASES = {
    # family, objective -> length of a sample's row, target length, special tokens beside the tokenizer's, kinds
    "causal": ("gpt", "causal", 33, 0, 0, TokenRows, HeldoutRows),
    "infill": ("gpt", {"name": "causal", "infill": {"rate": 0.5}}, 33, 0, 3, TokenRows, HeldoutRows),
    "prefix": ("gpt", "prefix", 33, 0, 1, TokenRows, TokenRows),
    "masked": ("bert", "masked", 31, 0, 4, TokenRows, TokenRows),
    "words": ("bert", WORDS, 31, 0, 4, TokenRows, TokenRows),
    "next": ("bert", NEXT, 32, 0, 4, SegmentPairs, SegmentPairs),
    # T5: 32 inputs hold 34 raw tokens (5 of noise in 2 spans), and 5 + 2 + 1 are the targets
    "spans": ("t5", "spans", 35, 8, 101, TokenRows, TokenRows),
    "split": ("t5", "prefix", 33, 32, 1, TokenRows, TokenRows),
}


@pytest.mark.parametrize("case", CASES)
def test_text(corpus, case):
    family, objective, length, target, specials, train, heldout = CASES[case]
    model = {"segments": 2} if family == "bert" else {"positions": "relative"} if family == "t5" else {}
    settings = job(corpus, family, objective, model=model)
    found = open_dataset(settings, progress=False)
    assert found.inputs == Inputs(vocab=BYTES + specials, length=32, target_length=target)
    assert found.specials.vocab == BYTES + specials
    assert found.tokenizer.vocab == BYTES
    ((name, samples, weight),) = found.train
    assert (name, weight) == (str(corpus), 1.0)
    assert type(samples) is train
    assert [type(s) for s in found.heldout] == [heldout]
    assert rows_of(samples, 2)["tokens"].shape == (2, length)
    assert found.notes[0].startswith(f"data {corpus}: 1")
    assert (found.starts is None) == (case != "words")
    if case == "words":
        assert found.starts.shape == (BYTES + specials,)
        assert found.starts[ord(" ")]
        assert not found.starts[ord("t")]
    computes(settings, found)


def computes(settings, found):
    """The model that the data describes takes what the objective makes of the samples, held-out ones too."""
    objective = build_objective(settings, found.inputs, found.specials, found.starts)
    held = heldout_rows(found.heldout[0], np.arange(4))
    scored = held.setdefault("scored", np.ones(4, bool))
    scored[2:] = False
    for rows in (rows_of(found.train[0][1], 4), held):
        batch = objective.collate(rows)
        out, counts = objective(batch), objective.counts(batch)
        assert torch.stack(list(out.terms.values())).isfinite().all()
        assert counts[objective.scored] > 0
        assert out.terms.keys() <= counts.keys()


def test_ul2(corpus):
    settings = job(corpus, "t5", "ul2", seq_len=48)
    found = open_dataset(settings, progress=False)
    assert found.specials.ids.keys() == {"pad", "mode_R", "mode_S", "mode_X", "bos"}
    assert found.inputs.vocab == BYTES + 4 + 100
    computes(settings, found)


def test_pairs_of_texts(pairs):
    source = {"path": str(pairs), "target": "target"}
    settings = job(pairs, "t5", "pairs", sources=[source], target_len=12, model={"positions": "relative"})
    found = open_dataset(settings, progress=False)
    assert found.inputs == Inputs(BYTES + 1, 32, 12)
    samples = [found.train[0][1], found.heldout[0]]
    assert all(type(s) is TextPairs for s in samples)
    assert sum(len(s) + s.left_out for s in samples) == 200
    assert sum(s.left_out for s in samples) == 10
    left_out = samples[0].left_out
    (note,) = [n for n in found.notes if "do not fit" in n]
    assert note.startswith(f"left out {left_out} documents of {pairs} that do not fit a row {pairs} pair ")
    computes(settings, found)


def test_a_source_of_pairs_names_its_targets(pairs):
    with pytest.raises(DataError, match=r"names its target column \(data\.sources\[\]\.target\)"):
        open_dataset(job(pairs, "t5", "pairs"), progress=False)


def test_nothing_held_out(corpus):
    assert open_dataset(job(corpus, heldout=0.0), progress=False).heldout == []


def test_held_out_text_that_fills_no_row_is_noted(corpus):
    found = open_dataset(job(corpus, "bert", "masked", heldout=0.01, seq_len=1024), progress=False)
    assert found.heldout == []
    assert any(note.startswith("held-out data is not used: ") for note in found.notes)


def test_text_that_fills_no_row(tmp_path):
    path = tmp_path / "few.txt"
    path.write_text("a few words\n")
    with pytest.raises(DataError, match=r"one row of data.seq_len = 32 needs 33"):
        open_dataset(job(path, heldout=0.0), progress=False)


def test_malformed_lines_are_noted(tmp_path, corpus):
    path = tmp_path / "broken.jsonl"
    path.write_text("{not json\n" + corpus.read_text())
    found = open_dataset(job(path, on_error="skip"), progress=False)
    assert any(n.startswith("left out 1 malformed lines: ") and "broken.jsonl:1" in n for n in found.notes)


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("objective", ["classify", "mae"])
def test_images(objective, class_token):
    settings = images(objective)
    vision = settings.model.vision.model_copy(update={"class_token": class_token})
    changes = {"model": settings.model.model_copy(update={"vision": vision})}
    pool = settings.objective.model_copy(update={"pool": "mean"})
    settings = settings.model_copy(update=changes | ({"objective": pool} if objective == "classify" else {}))
    found = open_dataset(settings)
    assert found.inputs == Inputs(length=4 + class_token, image=8, channels=1, classes=10)
    assert found.specials is found.tokenizer is found.prepared is None
    train, (heldout,) = found.train[0][1], found.heldout
    assert type(train) is type(heldout) is ImageSamples
    assert len(train) + len(heldout) == 1797
    assert ("label" in rows_of(train, 1)) == (objective == "classify")
    assert found.notes == [
        f"data sklearn:digits: {len(train):,} images to train on, {len(heldout):,} held out"
    ]
    computes(settings, found)


def test_held_out_images_are_not_augmented():
    settings = images()
    augment = settings.objective.augment.model_copy(update={"mixup": 0.5, "shift": 0.25})
    objective = settings.objective.model_copy(update={"augment": augment})
    found = open_dataset(settings.model_copy(update={"objective": objective}))
    assert "partner" in rows_of(found.train[0][1], 2)
    held = [rows_of(found.heldout[0], 2, seed) for seed in (0, 1)]
    assert set(held[0]) == {"pixels", "label", "key", "slot", "sample"}
    np.testing.assert_array_equal(held[0]["pixels"], held[1]["pixels"])


def test_images_with_other_classes_are_refused(tmp_path):
    np.savez(tmp_path / "more.npz", images=np.zeros((40, 8, 8), np.uint8), labels=np.arange(40) % 4)
    settings = images(sources=["sklearn:digits", str(tmp_path / "more.npz")])
    with pytest.raises(
        DataError, match=r"more\.npz: has other classes than sklearn:digits; blend alike sources"
    ):
        open_dataset(settings)
    unlabelled = images("mae", sources=["sklearn:digits", str(tmp_path / "more.npz")])
    assert len(open_dataset(unlabelled).train) == 2


def test_mixing_needs_classes():
    settings = images("mae")
    augment = settings.objective.augment.model_copy(update={"mixup": 0.5})
    objective = settings.objective.model_copy(update={"augment": augment})
    with pytest.raises(JobError, match=r"objective\.augment\.mixup = 0\.5: mixes classes"):
        open_dataset(settings.model_copy(update={"objective": objective}))
