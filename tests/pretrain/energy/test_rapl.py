"""RAPL from trees as the kernel shows them: what is counted once, counters that begin again, what we may not read."""

import os
from pathlib import Path

import pytest

from headway.pretrain.energy.counter import Unmeasured
from headway.pretrain.energy.rapl import gained, open_rapl

RANGE = 262_143_328_850
"""max_energy_range_uj of many servers."""


def domain(root: Path, place: str, name: str, energy: int, limit: int = RANGE) -> Path:
    folder = root / place
    folder.mkdir()
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{limit}\n")
    spend(folder, energy)
    return folder


def spend(folder: Path, energy: int) -> None:
    (folder / "energy_uj").write_text(f"{energy}\n")


@pytest.fixture
def server(tmp_path):
    """Two packages with cores and memory, the board of a laptop, and the second view of a package."""
    (tmp_path / "intel-rapl").mkdir()  # the control type itself: no domain
    for place, name in (
        ("intel-rapl:0", "package-0"),
        ("intel-rapl:0:0", "core"),
        ("intel-rapl:0:1", "dram"),
        ("intel-rapl:1", "package-1"),
        ("intel-rapl:1:0", "dram"),
        ("intel-rapl:2", "psys"),
        ("intel-rapl-mmio:0", "package-0"),
    ):
        domain(tmp_path, place, name, 1_000_000)
    return tmp_path


def test_packages_and_memory_count_once(server):
    counter = open_rapl(server)
    assert counter.source == "RAPL package-0, package-1, dram"
    assert not counter.estimate
    assert counter.joules() == 0
    for path in server.glob("intel-rapl*:*"):
        spend(path, 3_500_000)
    assert counter.joules() == 4 * 2.5  # two packages and their memories
    assert counter.joules() == 4 * 2.5
    counter.close()


def test_amd_has_packages_with_cores_alone(tmp_path):
    package = domain(tmp_path, "intel-rapl:0", "package-0", 5)
    domain(tmp_path, "intel-rapl:0:0", "core", 5)
    counter = open_rapl(tmp_path)
    spend(package, 2_000_005)
    assert counter.joules() == 2
    counter.close()


def test_counters_begin_again_at_a_range_of_their_own(tmp_path):
    first = domain(tmp_path, "intel-rapl:0", "package-0", 65_000_000_000, 65_532_610_987)
    second = domain(tmp_path, "intel-rapl:1", "package-1", 65_000_000_000)
    counter = open_rapl(tmp_path)
    spend(first, 467_389_013)  # 1 kJ on, by way of the end
    spend(second, 66_000_000_000)
    assert counter.joules() == pytest.approx(2000, rel=1e-9)
    spend(first, 400_000_000)
    assert counter.joules() == pytest.approx(2000 + 65_532.610_987 - 67.389_013, rel=1e-9)
    counter.close()


def test_gained():
    assert gained(5, 5, 100) == 0
    assert gained(5, 8, 100) == 3
    assert gained(98, 3, 100) == 5


def test_no_packages_is_said(tmp_path):
    with pytest.raises(Unmeasured, match="has no packages: a virtual machine"):
        open_rapl(tmp_path)
    with pytest.raises(Unmeasured, match="no packages"):
        open_rapl(tmp_path / "missing")


def test_what_only_root_may_read(server):
    """Since CVE-2020-8694 that is the rule; as root this process becomes nobody for a moment."""
    for path in server.glob("intel-rapl*:*/energy_uj"):
        path.chmod(0o400)
    for path in [server, *server.parents]:
        if path.stat().st_uid == os.geteuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    root = os.geteuid() == 0
    if not root:
        for path in server.glob("intel-rapl*:*/energy_uj"):
            path.chmod(0)
    try:
        if root:
            os.seteuid(65534)
        with pytest.raises(Unmeasured, match=r"intel-rapl:0/energy_uj: only root may read it; `chmod a\+r`"):
            open_rapl(server)
    finally:
        if root:
            os.seteuid(0)


def test_a_counter_that_goes_is_named(tmp_path):
    package = domain(tmp_path, "intel-rapl:0", "package-0", 5)
    counter = open_rapl(tmp_path)
    (package / "energy_uj").unlink()
    with pytest.raises(Unmeasured, match="energy_uj: No such file"):
        counter.joules()
    (package / "energy_uj").write_text("many\n")
    with pytest.raises(Unmeasured, match="holds no number"):
        counter.joules()
    counter.close()
