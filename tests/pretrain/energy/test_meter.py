"""Which counters a rank gets, and that everything is counted once over all ranks."""

import pytest
import torch

from headway.pretrain.config import Energy
from headway.pretrain.energy.counter import Unmeasured
from headway.pretrain.energy.meter import Meter, open_meter
from headway.pretrain.errors import JobError
from headway.tests.pretrain.energy.test_rapl import domain, spend

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def meter(tmp_path, source="auto", device=CPU, local_rank=0, **more) -> Meter:
    found = open_meter(Energy(source=source, **more), device, local_rank, 2, powercap=tmp_path)
    assert found is not None
    found.close()
    return found


def test_off_measures_nothing(tmp_path):
    assert open_meter(Energy(source="off"), CPU, 0, 2, powercap=tmp_path) is None


def test_auto_measures_where_it_can(tmp_path):
    package = domain(tmp_path, "intel-rapl:0", "package-0", 0)
    found = meter(tmp_path)
    assert (found.source, found.estimate) == ("RAPL package-0", False)
    spend(package, 7_000_000)
    assert found.take().joules == 7
    assert found.take().joules == 0


def test_a_node_is_read_by_its_first_rank_alone(tmp_path):
    package = domain(tmp_path, "intel-rapl:0", "package-0", 0)
    first, second = meter(tmp_path), meter(tmp_path, local_rank=1)
    spend(package, 7_000_000)
    assert [m.take().joules for m in (first, second)] == [7, 0]
    assert (first.source, first.estimate) == (second.source, second.estimate)


def test_auto_estimates_where_it_cannot_and_says_so(tmp_path):
    found = meter(tmp_path, local_rank=3, watts=100)
    assert found.estimate
    assert found.source == "estimate: 100 W a rank, as tracking.energy.watts states"
    assert any("not measured by RAPL" in note for note in found.notes)


@pytest.mark.parametrize(("source", "why"), [("rapl", "has no packages"), ("nvml", "NVML")])
def test_what_was_asked_for_by_name_is_not_replaced(tmp_path, source, why):
    with pytest.raises(JobError, match=rf"tracking.energy.source = '{source}': .*{why}.*legal choice: auto"):
        meter(tmp_path, source)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_a_gpu_without_nvml(tmp_path):
    """Its estimate stands beside what the host measures."""
    package = domain(tmp_path, "intel-rapl:0", "package-0", 0)
    found = meter(tmp_path, device=CUDA, watts=300)
    assert found.source == "estimate: 300 W a rank, as tracking.energy.watts states + RAPL package-0"
    assert found.estimate
    assert any("not measured by NVML" in note for note in found.notes)
    alone = meter(tmp_path, "rapl", device=CUDA)
    assert alone.source == "RAPL package-0"
    assert "GPUs are not counted: tracking.energy.source is rapl" in alone.notes
    spend(package, 1_000_000)
    assert alone.take().joules == 1


class Failing:
    source, estimate, total, closed = "a counter", False, 0.0, False

    def joules(self) -> float:
        self.total += 1
        if self.total > 2:
            raise Unmeasured("gone")
        return self.total

    def close(self) -> None:
        self.closed = True


def test_a_counter_that_fails_is_told_and_left_out():
    counter, now = Failing(), [0.0]
    found = Meter([counter], "a counter", False, clock=lambda: now[0])
    now[0] = 2.0
    reading = found.take()
    assert (reading.joules, reading.seconds, reading.watts) == (1, 2, 0.5)
    assert found.take().joules == 0
    assert found.troubles == ["energy is no longer counted by a counter: gone"]
    assert counter.closed
    assert found.take().joules == 0
    assert len(found.troubles) == 1
