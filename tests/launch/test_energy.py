"""Energy of whole runs: in every record, once over all ranks, over both lives of a run, and never a different curve."""

import json
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from headway.launch.energy import RunEnergy
from headway.launch.run import agree
from headway.launch.signals import StopRequest
from headway.parallel.checkpoint.save import Checkpointer
from headway.parallel.mesh import lay_out, start
from headway.pretrain.config import Job
from headway.pretrain.energy.meter import Meter
from headway.pretrain.errors import JobError
from headway.pretrain.records.metrics import read_metrics
from headway.pretrain.records.records import read_events
from headway.tests.chosen import first
from headway.tests.launch.test_train import command, losses, train, wait_for_step

__all__ = ["train"]


class Fixed:
    """A counter that gains so many joules a reading."""

    source, estimate = "estimate: fixed", True

    def __init__(self, joules: float) -> None:
        self.gain, self.total = joules, 0.0

    def joules(self) -> float:
        self.total += self.gain
        return self.total

    def close(self) -> None: ...


def agree_in_a_group(rank: int, world: int, layout: dict, folder: Path) -> list:
    """Two agreements; the last rank is asked to stop before the second."""
    job = Job.model_validate({"parallel": layout, "tracking": {"energy": {"source": "off"}}})
    here = start(job, lay_out(job.parallel, world), rank, world, rank, torch.device("cpu"), "gloo")
    energy, stop, answers = RunEnergy(job, here), StopRequest(), []
    checkpointer = Checkpointer(folder)
    off = agree(here, stop, checkpointer, energy)
    assert off.energy is None
    energy._meter = Meter([Fixed(10.0**rank)], "fixed", True)
    for asked in (False, rank == world - 1):
        stop.asked = asked
        said = agree(here, stop, checkpointer, energy)
        assert said.energy is not None
        answers.append((said.stop, said.energy.joules))
    return answers


@pytest.mark.parametrize("layout", first(1, [{"tensor": 2, "pipeline": 2}, {}]))
def test_one_sum_over_all_ranks_at_any_layout(pool, layout, tmp_path):
    """1 + 10 + 100 + 1000 joules: each rank counts once, whatever axis it is on."""
    for answers in pool(agree_in_a_group, ranks=4, layout=layout, folder=tmp_path):
        assert answers == [(False, 1111), (True, 1111)]


def test_a_run_tells_its_energy(train, capsys):
    folder = train("tracking.energy.source=tdp", "tracking.energy.watts=120", "tracking.energy.grid=FR",
                   "tracking.energy.pue=1.5")  # fmt: skip
    rows = read_metrics(folder)
    assert all(row["joules"] > 0 for row in rows)
    for row in rows:  # two clocks are read one after the other
        assert row["watts"] == pytest.approx(120, rel=0.3)
        assert row["joules"] >= 120 * 0.7 * row["step_seconds"]
    summary = json.loads((folder / "summary.json").read_text())
    energy = summary["energy"]
    assert energy["source"] == "estimate: 120 W a rank, as tracking.energy.watts states"
    assert energy["estimate"] is True
    assert energy["step_joules"] == pytest.approx(sum(row["joules"] for row in rows))
    assert energy["end_joules"] > 0  # the last evaluation
    assert energy["kg_co2e"] == pytest.approx(energy["kwh"] * 1.5 * 0.056)
    assert energy["place"] == "France"
    said = " ".join(capsys.readouterr().out.split())
    assert f"energy {energy['kwh']:.3g} kWh, {energy['kg_co2e']:.3g} kg CO2e (estimate: 120 W" in said
    page = (folder / "report.html").read_text()
    assert "≈" in page
    assert "estimate, not measured: estimate: 120 W" in page
    assert "France" in page
    kinds = [event["kind"] for event in read_events(folder)]
    assert kinds.index("start") < kinds.index("meter") < kinds.index("energy") < kinds.index("end")


def test_off_leaves_no_trace_and_no_other_curve(train):
    on, off = train("tracking.energy.source=tdp", name="on"), train("tracking.energy.source=off", name="off")
    assert losses(on) == losses(off)
    assert not any({"joules", "watts"} & row.keys() for row in read_metrics(off))
    assert "energy" not in json.loads((off / "summary.json").read_text())
    assert not {"meter", "energy"} & {event["kind"] for event in read_events(off)}


def test_an_unknown_source_is_refused_before_a_record_is_opened(train, tmp_path):
    if Path("/sys/class/powercap/intel-rapl:0").exists():
        pytest.skip("this machine has RAPL")
    with pytest.raises(JobError, match=r"tracking.energy.source = 'rapl'.*auto"):
        train("tracking.energy.source=rapl")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.matrix
def test_a_killed_run_counts_what_it_did_in_vain(train, small_job, tmp_path):
    """SIGKILL before the first checkpoint: all steps are done twice, and what the first life used is told."""
    sets = ["train.steps=40", "checkpoint.every=0", "tracking.energy.source=tdp", "tracking.energy.watts=100"]
    words = [word for one in sets for word in ("--set", one)]
    child = subprocess.Popen(command(small_job, tmp_path, *words), stdout=subprocess.PIPE, text=True)
    wait_for_step(child, 13)
    child.send_signal(signal.SIGKILL)
    child.wait()
    gone = read_metrics(tmp_path / "run")
    assert len(gone) >= 13
    folder = train(*sets)
    begun = [event for event in read_events(folder) if event["kind"] == "start"]
    assert [event.get("lost_steps", 0) for event in begun] == [0, len(gone)]
    energy = json.loads((folder / "summary.json").read_text())["energy"]
    assert energy["lost_joules"] == pytest.approx(sum(row["joules"] for row in gone))
    assert energy["steps_measured"] == 40
    assert energy["joules"] == pytest.approx(
        energy["step_joules"] + energy["lost_joules"] + energy["end_joules"]
    )
