"""The endpoint, scraped over HTTP and read by prometheus_client's own parser."""

import io
import json
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse

from headway.pretrain.config import Job
from headway.pretrain.records.metrics import read_metrics
from headway.pretrain.records.records import Records

PLACE = {
    "world": 4,
    "layout": {"shard": 2, "tensor": 2},
    "hosts": {"a": [0, 1], "b": [2, 3]},
    "precision": "bf16",
}


def job(port: int = 0, **more) -> Job:
    settings = {"wandb": "off", "backends": ["prometheus"], "prometheus": {"port": port}, **more}
    return Job.model_validate({"run": {"name": "proof"}, "tracking": settings})


def row(step: int) -> dict:
    return {
        "step": step, "loss": 1 / step, "lr": 1e-3, "grad_norm": 0.5, "tokens": 512, "tokens_per_second": 1e4,
        "step_seconds": 0.07, "mfu": 0.4, "memory_gib": 1.5, "experts/load": 0.25, "warnings": 3,
    }  # fmt: skip


def target(run_dir: Path) -> str:
    ((found,),) = [group["targets"] for group in json.loads((run_dir / "prometheus.json").read_text())]
    return found


def fetch(run_dir: Path, accept: str = "text/plain") -> str:
    request = urllib.request.Request(f"http://{target(run_dir)}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode()


def samples(text: str) -> dict[str, float]:
    """Name -> value of what has no label."""
    return {s.name: s.value for family in parse(text) for s in family.samples if not s.labels}


def test_a_scrape_while_the_run_goes_agrees_with_metrics_jsonl(tmp_path):
    stream = io.StringIO()
    records = Records(tmp_path, job(), start_step=0, place=PLACE, stream=stream)
    for step in (1, 2, 3):
        records.step(row(step))
    records.event("checkpoint", step=2, path=tmp_path)
    records.event("warning", message="slow")
    records.event("eval", heldout_loss=0.25)
    text = fetch(tmp_path)
    found, rows = samples(text), read_metrics(tmp_path)
    for name in ("loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory_gib", "heldout_loss", "step"):
        assert found[f"headway_{name}"] == rows[-1][name]
    assert found["headway_experts_load"] == 0.25
    assert found["headway_tokens_total"] == sum(r["tokens"] for r in rows)
    assert found["headway_tokens_last"] == 512
    assert found["headway_warnings_total"] == 1
    assert found["headway_warnings_last"] == 3
    assert found["headway_checkpoint_step"] == 2
    assert found["headway_steps_planned"] == 1000
    assert found["headway_running"] == 1
    assert found["headway_step_duration_seconds_count"] == 3
    assert found["headway_step_duration_seconds_sum"] == pytest.approx(0.21)
    assert found["process_resident_memory_bytes"] > 1e6
    assert found["headway_checkpoint_timestamp_seconds"] >= found["headway_last_step_timestamp_seconds"] > 1e9
    buckets = {
        s.labels["le"]: s.value
        for family in parse(text)
        for s in family.samples
        if s.name == "headway_step_duration_seconds_bucket"
    }
    assert (buckets["0.05"], buckets["0.1"], buckets["+Inf"]) == (0, 3, 3)
    (info,) = (s.labels for family in parse(text) for s in family.samples if s.name == "headway_run_info")
    assert info["run"] == "proof"
    assert (info["world"], info["hosts"], info["layout"], info["precision"]) == (
        "4",
        "2",
        "shard 2 x tensor 2",
        "bf16",
    )
    assert list(parse_open(fetch(tmp_path, "application/openmetrics-text; version=1.0.0")))
    assert f"Prometheus: http://{target(tmp_path)}/metrics" in stream.getvalue()
    address = target(tmp_path)
    records.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://{address}/metrics", timeout=10)
    assert not (tmp_path / "prometheus.json").exists()


def listening(port: int) -> set[str]:
    """Local addresses with a listening socket on a port, from the kernel's own tables."""
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    ends = [line[1].split(":") for line in lines if line[3] == "0A"]
    return {address for address, found in ends if int(found, 16) == port}


def test_it_is_bound_to_this_machine_alone_unless_told_otherwise(tmp_path):
    records = Records(tmp_path / "a", job(), stream=io.StringIO())
    port = int(target(tmp_path / "a").rpartition(":")[2])
    assert listening(port) == {"0100007F"}  # 127.0.0.1, as this kernel writes it
    records.close()
    assert listening(port) == set()
    everywhere = job(prometheus={"host": "0.0.0.0", "port": 0})
    records = Records(tmp_path / "b", everywhere, stream=io.StringIO())
    name, _, port = target(tmp_path / "b").rpartition(":")
    assert name == socket.gethostname()
    assert listening(int(port)) == {"00000000"}
    records.close()


def test_a_port_that_is_taken_is_a_warning(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        stream = io.StringIO()
        records = Records(tmp_path, job(server.getsockname()[1]), stream=stream)
        records.step(row(1))
        records.close()
    assert stream.getvalue().count("cannot be listened on") == 1
    assert "port = 0 takes a port that is free" in stream.getvalue()
    assert len(read_metrics(tmp_path)) == 1


def test_numbers_that_are_none_and_counters_that_would_fall(tmp_path):
    records = Records(tmp_path, job(), stream=io.StringIO())
    records.step({"step": 1, "loss": float("inf"), "a b": 1, "a-b": 2, "tokens": -1, "joules": 2.5})
    found = samples(fetch(tmp_path))
    assert found["headway_loss"] != found["headway_loss"]
    assert found["headway_a_b"] == 2
    assert found["headway_tokens_total"] == 0
    assert found["headway_joules_total"] == 2.5
    records.close()


def test_nothing_secret_is_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    settings = job(tags=["hidden-tag"], project="hidden-project", prompt="hidden-prompt")
    records = Records(tmp_path, settings, place={"more": "hidden-place"}, stream=io.StringIO())
    records.event("warning", message="hidden-message")
    text = fetch(tmp_path)
    records.close()
    assert "hidden" not in text
    assert "0123456789abcdef" not in text
    assert str(tmp_path) not in text
