"""Pairs of maps: their divergence is SciPy's and the kernels', and the page has what it should and no more."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr

from headway.kernels.map_distillation import map_distillation_loss
from headway.pretrain.records.map_pairs import (
    CELLS,
    COLUMNS,
    HEADS,
    LAYERS,
    ROWS,
    MapPairs,
    amount,
    divergences,
    draw_pairs,
    spread,
)
from headway.tests.pretrain.records.test_report import HOSTILE, make_run, report, squeeze


def random_maps(*shape: int, seed: int = 0, causal: bool = False) -> np.ndarray:
    weights = np.random.default_rng(seed).exponential(size=(*shape, shape[-1])) ** 3
    weights = np.tril(weights) if causal else weights
    return weights / weights.sum(-1, keepdims=True)


def pairs(layers=2, heads=3, size=8, tokens=None, **named) -> MapPairs:
    maps = [random_maps(layers, heads, size, seed=seed) for seed in (1, 2)]
    facts = {
        "layers": [(i, 2 * i + 1) for i in range(layers)],
        "heads": [[2 * h, 2 * h + 1] for h in range(heads)],
    }
    return MapPairs(
        tokens or [f"t{i}" for i in range(size)], **{**facts, "student": maps[0], "teacher": maps[1], **named}
    )


@pytest.mark.parametrize("causal", [False, True])
def test_divergences_are_those_of_scipy(causal):
    p, q = (random_maps(2, 3, 7, seed=seed, causal=causal) for seed in (1, 2))
    kl, js = divergences(p, q)
    # SciPy's Jensen-Shannon is the distance, the square root of the divergence. Sums of 7 terms in another order.
    np.testing.assert_allclose(kl, rel_entr(p, q).sum(-1).mean(-1), rtol=1e-12)
    np.testing.assert_allclose(js, (jensenshannon(p, q, axis=-1) ** 2).mean(-1), rtol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_divergences_are_those_that_the_kernels_learn_by(causal):
    """Scores log p of queries log p and keys I have the softmax p."""
    size, real = 7, 5
    p, q = (random_maps(1, 3, size, seed=seed, causal=causal) for seed in (1, 2))
    counted = np.arange(size) < real
    p, q = (np.where(counted, maps, 0) for maps in (p, q))  # nobody looks at padding
    found = divergences(p, q, counted)
    eye = torch.eye(size, dtype=torch.float64).expand(1, 3, -1, -1)
    scores = [torch.from_numpy(np.log(np.where(maps > 0, maps, 1))) for maps in (p, q)]
    given = {"mask": torch.from_numpy(counted)[None], "causal": causal, "scale": 1.0, "kernel": "reference"}
    for loss, values in zip(("kl", "js"), found, strict=True):
        expected = map_distillation_loss(scores[0], eye, scores[1], eye, loss=loss, **given)
        assert values.mean() == pytest.approx(expected.item(), rel=1e-12)


def test_rows_that_see_nothing_and_keys_without_weight():
    p = np.array([[0.5, 0.5], [0.0, 0.0]])
    q = np.array([[1.0, 0.0], [0.5, 0.5]])
    kl, js = divergences(p, q)
    assert np.isinf(kl)
    assert js == pytest.approx((np.log(2 / 3) * 0.5 + np.log(2) * 0.5 + np.log(4 / 3)) / 2)
    assert divergences(q[:1].repeat(2, 0), p[:1].repeat(2, 0))[0] == pytest.approx(np.log(2))
    assert np.isnan(divergences(p, np.zeros((2, 2)))).all()
    assert np.isnan(divergences(p, np.array([[1.5, -0.5], [0.5, 0.5]]))).all()
    assert np.isnan(divergences(np.full((2, 2), np.nan), q)).all()
    assert [amount(v) for v in (0.0, -1e-17, 1.23456, 0.0123, 0.00012, np.inf, np.nan)] == [
        "0.000", "0.000", "1.235", "0.012", "1.2e-4", "∞", "–",
    ]  # fmt: skip


def test_pictures_of_both_are_their_weights():
    shown = pairs()
    drawn = draw_pairs(shown)
    for i, layer in enumerate(drawn["layers"]):
        assert (layer["ours"], layer["theirs"]) == (i + 1, 2 * i + 2)
        for h, head in enumerate(layer["heads"]):
            for whose in ("student", "teacher"):
                data = base64.b64decode(head[whose].split(",", 1)[1])
                levels = np.asarray(Image.open(io.BytesIO(data)))
                expected = np.round(255 * np.sqrt(getattr(shown, whose)[i, h]))
                np.testing.assert_array_equal(levels, expected)
            assert head["theirs"] == f"heads {2 * h + 1} and {2 * h + 2}"


def test_a_large_model_is_sampled_and_says_so(tmp_path):
    layers, heads, size = ROWS + 2, COLUMNS + 8, 10
    student, teacher = np.full((2, layers, heads, size, size), 0.1)
    shown = pairs(layers, heads, size, student=student, teacher=teacher)
    drawn = draw_pairs(shown)
    assert [layer["ours"] for layer in drawn["layers"]] == [1, 11, 21, 30, 40, 50]
    assert all(len(layer["heads"]) == HEADS for layer in drawn["layers"])
    assert len(drawn["table"]["rows"]) == ROWS
    assert all(len(row["cells"]) == COLUMNS for row in drawn["table"]["rows"])
    assert drawn["notes"] == [
        f"Pictures are of {LAYERS} of the 50 layers, evenly spaced; the table has 48 of them.",
        f"Pictures are of {HEADS} of the 40 heads, evenly spaced; the table has 32 of them.",
    ]
    linked = [cell["link"] for row in drawn["table"]["rows"] for cell in row["cells"] if cell["link"]]
    pictured = {head["name"] for layer in drawn["layers"] for head in layer["heads"]}
    assert set(linked) <= pictured


def test_images_of_many_patches_are_cut_and_the_page_stays_small(tmp_path):
    make_run(tmp_path, 10)
    shown = pairs(6, 12, 197)
    page, text = report(tmp_path, {}, pairs=shown)
    side = int((CELLS / (2 * 72)) ** 0.5)
    assert f"Pictures show the first {side} of 197 places; the divergence is of all." in squeeze(page.text)
    assert len(text) < 1_000_000
    kl, _ = divergences(shown.teacher, shown.student)
    assert f"KL {amount(kl[0, 0])}" in page.text


def test_the_page_has_a_figure_for_each_head_and_a_cell_for_each_divergence(tmp_path):
    make_run(tmp_path, 10)
    shown = pairs(2, 3, notes=("Something is missing.",), learned=False)
    page, _ = report(tmp_path, {}, pairs=shown)
    figures = [a for a in page.all("figure") if a.get("class") == "pair"]
    assert [a["id"] for a in figures] == [f"pair-{i}-{h}" for i in (1, 2) for h in (1, 2, 3)]
    assert len([a for a in page.all("img") if a.get("class") == "map"]) == 12
    assert {a["href"] for a in page.all("a")} == {f"#{a['id']}" for a in figures}
    said, kl = squeeze(page.text), divergences(shown.teacher, shown.student)[0]
    assert "Something is missing." in said
    assert "Maps were no part of the loss." in said
    for i in range(2):
        row = " ".join([f"{i + 1} ← {2 * i + 2}", *map(amount, kl[i]), amount(kl[i].mean())])
        assert row in said
    assert json.loads(next(a["data-tokens"] for a in page.all("p") if "data-tokens" in a)) == shown.tokens


def test_without_pairs_the_page_says_why(tmp_path):
    make_run(tmp_path, 10)
    page, _ = report(tmp_path, {}, pairs=MapPairs.none("The teacher has no maps."))
    assert "The teacher has no maps." in page.text
    assert not [a for a in page.all("figure") if a.get("class") == "pair"]
    assert "Teacher and student" not in report(tmp_path, {})[0].text


def test_hostile_tokens_stay_text(tmp_path):
    make_run(tmp_path, 10)
    tokens = [HOSTILE, "</p></script>'"]
    page, text = report(tmp_path, {}, pairs=pairs(size=2, tokens=tokens, notes=(HOSTILE,)))
    assert "<script>alert" not in text
    assert all("onerror" not in a for _, a in page.elements)
    assert json.loads(next(a["data-tokens"] for a in page.all("p") if "data-tokens" in a)) == tokens


def test_maps_and_their_names_must_agree():
    with pytest.raises(ValueError, match=r"teacher is \(2, 3, 4, 4\), expected \(2, 3, 8, 8\)"):
        pairs(teacher=random_maps(2, 3, 4))


def test_numbers_are_spread_evenly():
    assert spread(4, 6) == [0, 1, 2, 3]
    assert spread(12, 6) == [0, 2, 4, 7, 9, 11]
    assert spread(0, 6) == []
