"""From records to kWh and CO2: each step once, what was done in vain beside it, and grids by number or code."""

import json

import pytest

from headway.pretrain.config import Job
from headway.pretrain.energy.account import account, in_words, lost
from headway.pretrain.energy.grid import COUNTRIES, find_grid
from headway.pretrain.errors import JobError
from headway.pretrain.recipe import resolve
from headway.pretrain.records.metrics import MetricsFile, read_metrics
from headway.pretrain.records.records import Records, read_events

METER = {"kind": "meter", "source": "RAPL package-0", "estimate": False, "notes": ["a note"]}


def rows(count: int, joules: float = 3600.0, watts: float = 100.0):
    return [{"step": i + 1, "tokens": 50, "joules": joules, "watts": watts} for i in range(count)]


def test_a_run_by_hand():
    events = [
        METER,
        {"kind": "resume", "step": 4, "lost_steps": 2, "lost_joules": 7200.0},
        METER,
        {"kind": "energy", "joules": 1800.0},
    ]
    found = account(rows(10), events, {"tracking.energy.pue": 1.2, "tracking.energy.grid": 0.4})
    assert found is not None
    assert found["step_joules"] == 36_000
    assert found["joules"] == 36_000 + 7200 + 1800
    assert found["kwh"] == pytest.approx(0.0125)
    assert found["kg_co2e"] == pytest.approx(0.0125 * 1.2 * 0.4)
    assert found["watts"] == pytest.approx(100)
    assert found["joules_per_token"] == pytest.approx(72)
    assert (found["source"], found["estimate"], found["notes"]) == ("RAPL package-0", False, ["a note"])
    assert found["grid"] == "stated in the job"
    assert in_words(found) == "0.0125 kWh, 0.006 kg CO2e (RAPL package-0)"


def test_power_is_weighed_by_time():
    """100 W over 36 s and 400 W over 4 s: 130 W, not 250 W."""
    found = account([*rows(1, 3600, 100), *rows(1, 1600, 400)], [METER], {})
    assert found is not None
    assert found["watts"] == pytest.approx(5200 / 40)


def test_a_part_that_was_estimated_makes_the_whole_an_estimate():
    second = {**METER, "source": "estimate: TDP 100 W", "estimate": True}
    found = account(rows(1), [METER, second, METER], {})
    assert found is not None
    assert found["estimate"]
    assert found["source"] == "RAPL package-0; then estimate: TDP 100 W"


def test_nothing_measured_is_nothing_told():
    assert account([], [], {}) is None
    assert account([{"step": 1, "tokens": 5}], [METER], {}) is None
    assert account([{"step": 1, "joules": float("nan")}], [METER], {}) is None


def test_steps_in_vain():
    assert lost(rows(6), 6) == {}
    assert lost(rows(6), 4) == {"lost_steps": 2, "lost_joules": 7200.0}
    assert lost([{"step": 3}], 0) == {"lost_steps": 1}


def test_a_killed_run_tells_what_it_did_in_vain(tmp_path):
    """The rows are cut where the run goes on; what they took stays known."""
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for row in rows(7):
        file.write(row)
    file.close()  # and no event `end`: the process was killed
    Records(tmp_path, Job(), 5).close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    resumed = next(e for e in read_events(tmp_path) if e["kind"] == "resume")
    assert (resumed["lost_steps"], resumed["lost_joules"]) == (2, 7200)
    Records(tmp_path, Job(), 5).close()
    found = account(read_metrics(tmp_path), read_events(tmp_path), {})
    assert found is not None
    assert found["lost_joules"] == 7200
    json.dumps(found, allow_nan=False)


def test_grids():
    assert find_grid(0.05).kg_per_kwh == 0.05
    assert find_grid(0).kg_per_kwh == 0
    assert find_grid("fr").place == "France"
    assert find_grid("FR").kg_per_kwh == 0.056
    assert 0.4 < find_grid(None).kg_per_kwh < 0.6
    assert find_grid(None).place is None
    assert all(len(code) == 2 and 20 < grams < 900 for code, (_, grams) in COUNTRIES.items())


@pytest.mark.parametrize(
    ("given", "near"), [("FRA", "FR"), ("Germany", "DE"), ("UK", "[A-Z]{2}"), ("??", "a number")]
)
def test_an_unknown_grid_names_the_nearest(given, near):
    with pytest.raises(JobError, match=rf"tracking.energy.grid = .*legal choice: {near}"):
        Job.model_validate({"tracking": {"energy": {"grid": given}}})


def test_norway_is_no_boolean():
    assert resolve(["gpt/tiny"], ["tracking.energy.grid=NO"]).job.tracking.energy.grid == "NO"
