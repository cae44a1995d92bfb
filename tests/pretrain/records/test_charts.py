"""Curves of what is learned from a teacher."""

import json

from headway.tests.pretrain.records.test_report import make_run, report, squeeze


def names(page) -> list[tuple[list[str], int]]:
    """Curves of every chart, and how many values the last of them has."""
    charts = [json.loads(a["data-reading"]) for a in page.all("svg") if "data-reading" in a]
    return [([c["name"] for c in chart["curves"]], len(chart["curves"][-1]["x"])) for chart in charts]


def test_parts_of_the_loss_are_drawn_with_their_heldout_values(tmp_path):
    learned = {"soft_loss": 0.5, "task_loss": 2.0, "learned/attention.1": 0.1, "accuracy": 0.3}
    make_run(tmp_path, 20, **learned, **{"heldout_learned/attention.1": 0.2})
    page, _ = report(tmp_path, {})
    said = squeeze(page.text)
    assert "What is learned from the teacher" in said
    for title in (
        "The task's own loss without the teacher",
        "Soft targets",
        "Attention maps decoder, divergence",
    ):
        assert title in said
    assert names(page)[1:4] == [(["train"], 20), (["train"], 20), (["train", "held-out"], 20)]


def test_a_run_without_a_teacher_has_none(tmp_path):
    make_run(tmp_path)
    assert "learned from the teacher" not in report(tmp_path, {})[0].text
