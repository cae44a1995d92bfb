"""report.html: one file, nothing fetched, everything said, nothing executed that a run's data brought."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from headway.pretrain.config import Job
from headway.pretrain.records.attention_maps import AttentionMaps
from headway.pretrain.records.metrics import MetricsFile
from headway.pretrain.records.records import Records
from headway.pretrain.records.report import bars, flatten, write_report

VOID = {"meta", "img", "br", "input", "link"}
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
SUMMARY = {
    "heldout_loss": 2.731,
    "bits_per_byte": 1.634,
    "score": {
        "title": "bits per byte",
        "note": "What it takes to store one byte of 612,334 bytes.",
        "lower": True,
        "entries": [("this model", 1.634), ("zlib -9", 1.913), ("xz -9", 1.571)],
    },
    "parameters": 4_934_144,
    "device": "a CPU",
    "precision": "bf16",
    "precision_reason": "measured so",
    "peak_flops": 664e9,
    "peak_source": "measured: best square bf16 product",
    "prompt": "def main():\n",
    "completion": "    return 1 < 2\n",
}


class Page(HTMLParser):
    """Elements, text and balance of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.text += " " if tag in ("dt", "dd", "td", "th", "p") else ""

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def make_run(run_dir, steps: int = 30, **odd) -> None:
    run_dir.mkdir(exist_ok=True)
    file = MetricsFile(run_dir / "metrics.jsonl")
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "loss": 5 / step + 2,
            "lr": 1e-3,
            "grad_norm": 1.0,
            "tokens": 1000,
            "step_seconds": 0.5,
        }
        row |= {"tokens_per_second": 2000, "mfu": 0.4, "memory_gib": 1.25}
        file.write(row | odd)
        if step % 10 == 0:
            file.amend({"heldout_loss": 5 / step + 2.1})
    file.close()


def maps(layers: int = 2, heads: int = 3, size: int = 8, tokens=None) -> AttentionMaps:
    weights = np.tril(np.random.default_rng(0).random((layers, heads, size, size)))
    return AttentionMaps(tokens or [f"t{i}" for i in range(size)], weights / weights.sum(-1, keepdims=True))


def report(run_dir, *arguments, **named) -> tuple[Page, str]:
    text = write_report(run_dir, *arguments, **named).read_text(encoding="utf-8")
    return Page(text), text


def squeeze(text: str) -> str:
    return " ".join(text.split())


def test_a_whole_run_is_told(tmp_path):
    make_run(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000030"
    checkpoint.mkdir(parents=True)
    (checkpoint / "shard").write_bytes(bytes(3 * 2**20))
    (checkpoint.parent / "LATEST").write_text("step_00000030\n")
    page, _ = report(tmp_path / "run", Job().model_dump(mode="json"), maps(), {**SUMMARY, "status": "done"})
    said = squeeze(page.text)
    for number in (
        "2.731",
        "1.634",
        "1.913",
        "1.571",
        "30k",
        "0:15",
        "2k",
        "40.0%",
        "1.25 GiB",
        "4.93M parameters",
    ):
        assert number in said
    assert "of 664 GFLOP/s, measured: best square bf16 product" in said
    assert "bf16 measured so" in said
    assert "def main():     return 1 < 2" in page.text.replace("\n", " ")
    assert "step_00000030 latest 3.0 MiB" in said
    assert "optimizer.lr 0.0003" in said
    charts = [json.loads(a["data-reading"]) for a in page.all("svg") if "data-reading" in a]
    assert [c["name"] for chart in charts for c in chart["curves"]] == [
        "train", "held-out", "learning rate", "gradient norm", "throughput", "memory",
    ]  # fmt: skip
    assert charts[0]["curves"][1]["x"] == [10, 20, 30]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 30
    assert summary["tokens"] == 30_000
    assert summary["bits_per_byte"] == 1.634
    assert summary["train_loss"] == pytest.approx(np.mean([5 / s + 2 for s in range(21, 31)]))


def test_nothing_is_fetched_and_every_image_decodes(tmp_path):
    make_run(tmp_path / "run")
    page, text = report(tmp_path / "run", {}, maps(), SUMMARY)
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for key, value in attributes.items():
            if key in ("src", "href", "xlink:href", "srcset", "data", "action"):
                assert value.startswith(("data:", "#")), (tag, key, value)
    # What is left of addresses are names of XML namespaces.
    assert set(re.findall(r"https?://[^\s\"'<>)]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not re.search(r"url\((?!#)|@import", text)
    images = [a["src"] for a in page.all("img")]
    assert len(images) == 2 * 3 + 1
    for source in images:
        image = Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1])))
        image.load()
        assert image.size == (8, 8)
    (policy,) = (a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_hostile_text_stays_text(tmp_path):
    run = tmp_path / "<b>run"
    make_run(run)
    records = Records(run, Job(), start_step=30, stream=io.StringIO())
    records.event("warning", message=HOSTILE)
    records.close()
    job = {"run": {"name": {"value": HOSTILE, "origin": HOSTILE}}, HOSTILE: HOSTILE}
    hostile = {
        "prompt": HOSTILE,
        "completion": HOSTILE,
        "device": HOSTILE,
        "precision_reason": HOSTILE,
        "status": HOSTILE,
    }
    page, text = report(run, job, maps(size=2, tokens=[HOSTILE, "</span></script>"]), SUMMARY | hostile)
    assert len(page.all("script")) == 1
    assert all("onerror" not in a for _, a in page.elements)
    assert not page.all("b") or all(tag != "b" or not a for tag, a in page.elements)
    assert "<script>alert" not in text
    assert page.text.count(HOSTILE) >= 6
    tokens = [a["data-token"] for a in page.all("span") if "data-token" in a]
    assert tokens == [HOSTILE, "</span></script>"]


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_run_that_has_just_begun(tmp_path, steps):
    make_run(tmp_path / "run", steps)
    page, _ = report(tmp_path / "run", Job().model_dump(mode="json"))
    assert "running" in page.text
    assert ("No step has been recorded yet" in page.text) == (steps == 0)


def test_a_folder_with_nothing_in_it(tmp_path):
    page, _ = report(tmp_path, {})
    assert "No step has been recorded yet" in page.text


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_numbers_that_are_none(tmp_path, value):
    make_run(tmp_path / "run", 12, loss=value, grad_norm=value, mfu=value, memory_gib=value)
    page, text = report(tmp_path / "run", {}, summary={"heldout_loss": value, "bits_per_byte": value})
    assert "The loss was not finite at 12 steps (first at step 1)" in squeeze(page.text)
    assert ">nan<" not in text
    assert json.loads((tmp_path / "run" / "summary.json").read_text(), parse_constant=pytest.fail)


def test_the_status_follows_the_events(tmp_path):
    records = Records(tmp_path, Job(), stream=io.StringIO())
    make_run(tmp_path)
    assert 'class="status running"' in report(tmp_path, {})[1]
    records.close("stopped")
    assert 'class="status stopped"' in report(tmp_path, {})[1]
    Records(tmp_path, Job(), start_step=30, stream=io.StringIO())
    assert 'class="status running"' in report(tmp_path, {})[1]


def test_a_rebuilt_report_keeps_what_only_the_end_knew_until_the_run_goes_on(tmp_path):
    make_run(tmp_path)
    report(tmp_path, {}, summary=SUMMARY)
    assert "1.634" in report(tmp_path, {})[0].text
    make_run(tmp_path, 40)
    later = report(tmp_path, {})[0].text
    assert "1.634" not in later  # measured at step 30
    assert "1.913" in later  # zlib's number is the text's own


def test_origins_of_settings(tmp_path):
    job = {
        "model": {"layers": {"value": 4, "origin": "tiny.yaml"}, "heads": {"value": 2, "origin": "default"}},
        "data": {
            "sources": {"value": [{"path": "stdlib:", "weight": 1.0}], "origin": "default"},
            "cache": None,
        },
    }
    assert list(flatten(job)) == [
        ("model.layers", 4, "tiny.yaml"),
        ("model.heads", 2, "default"),
        ("data.sources", [{"path": "stdlib:", "weight": 1.0}], "default"),
        ("data.cache", None, ""),
    ]
    page, _ = report(tmp_path, job)
    assert [a["class"] for a in page.all("tr") if a.get("class") in ("set", "default")] == [
        "set", "default", "default", "default",
    ]  # fmt: skip
    assert "data.cache null" in squeeze(page.text)


def test_bars_are_in_proportion():
    found = bars(SUMMARY)
    assert [(b["name"], b["ours"]) for b in found] == [
        ("this model", True),
        ("zlib -9", False),
        ("xz -9", False),
    ]
    assert [b["share"] for b in found] == pytest.approx([100 * v / 1.913 for v in (1.634, 1.913, 1.571)])
    assert bars({"score": {"entries": [("this model", math.nan)]}}) == []


def test_the_page_stays_small(tmp_path):
    make_run(tmp_path, 2000)
    path = write_report(tmp_path, Job().model_dump(mode="json"), maps(4, 6, 64), SUMMARY)
    assert path.stat().st_size < 1_000_000
