"""What a model does with samples while it trains: what is told, and that telling changes nothing."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from headway.launch import run
from headway.pretrain.records import records
from headway.pretrain.records.backends.base import Gallery
from headway.pretrain.records.metrics import read_metrics
from headway.tests.launch.test_families import start


class Keeper:
    """A backend that keeps what it is shown."""

    def __init__(self) -> None:
        self.shown: dict[int, Gallery] = {}

    def show(self, step: int, gallery: Gallery) -> None:
        self.shown[step] = gallery

    def log(self, *_: object) -> None: ...

    event = histograms = close = log


@pytest.fixture
def keeper(monkeypatch) -> Keeper:
    found = Keeper()
    monkeypatch.setattr(records, "open_backends", lambda *_: [found])
    return found


def test_samples_on_the_way_leave_the_curve_as_it_is(small_job, tmp_path, keeper):
    def losses(name: str, *sets: str) -> list[float]:
        run.train(
            [str(small_job)], [f"run.dir={tmp_path}", f"run.name={name}", "tracking.wandb=offline", *sets]
        )
        return [row["loss"] for row in read_metrics(tmp_path / name)]

    plain = losses("plain")
    assert list(keeper.shown) == [20]
    assert losses("sampled", "tracking.samples_every=3") == plain  # to the bit
    assert list(keeper.shown) == [20, 3, 6, 9, 12, 15, 18]
    (row,) = keeper.shown[9].tables["samples"].rows
    assert row[:2] == (9, "the cat")
    assert isinstance(row[2], str)
    assert sorted(keeper.shown[9].pictures) == ["attention/layer_01", "attention/layer_02"]
    (picture,) = keeper.shown[9].pictures["attention/layer_01"]
    assert Image.open(io.BytesIO(picture.png)).width > 2 * 96  # two heads


def told(name: str, corpus: Path, tmp_path: Path, keeper: Keeper) -> Gallery:
    start(name, corpus, tmp_path, "tracking.wandb=offline", "tracking.samples_every=2")
    assert sorted(keeper.shown) == [2, 4]
    return keeper.shown[2]


def test_a_masked_model_shows_its_guesses(corpus, tmp_path, keeper):
    gallery = told("bert/tiny", corpus, tmp_path, keeper)
    table = gallery.tables["masked_tokens"]
    assert table.columns == ("step", "text", "place", "guess", "true")
    assert table.rows
    assert "samples" not in gallery.tables
    for step, text, place, guess, true in table.rows:
        assert step == 2
        assert "<mask>" in text
        assert 0 <= place < 48
        assert guess
        assert true


def test_an_autoencoder_shows_what_it_paints(corpus, tmp_path, keeper):
    gallery = told("vit/mae_tiny", corpus, tmp_path, keeper)
    (picture,) = gallery.pictures["reconstructions"]
    page = np.asarray(Image.open(io.BytesIO(picture.png)))
    assert page.shape[1] > 3 * page.shape[0]  # ten images beside each other, three rows
