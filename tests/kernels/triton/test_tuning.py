"""Tiles that are measured: which launch goes by which choice, what replaces a default, and how choices are kept."""

from __future__ import annotations

import importlib
import math
from collections import defaultdict
from typing import Any

import pytest
import torch

from headway.kernels.triton import tuning, workloads
from headway.kernels.triton.targets import TARGETS
from headway.kernels.triton.tuning import Config, Space
from headway.tests.kernels.triton.finding import find_triton

pytestmark = pytest.mark.skipif(not find_triton(), reason="Triton is neither installed nor among the oracles")

META, GPU = torch.device("meta"), torch.device("cuda", 0)
SIDE = Space("side", lambda target, width: [Config({"R": width // n}, 4, n) for n in (1, 2, 4)])
LISTS = {"adamw": "1,000 of 4,096, with a scale", "lamb": "1,000 of 4,096, with a scale"}
"""Of tables of many programs, the smallest."""


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A GPU by name, whose choices are kept in the test's folder."""
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU of a test")
    monkeypatch.setattr(tuning, "target_of", lambda device: "sm_80")
    tuning.measured.cache_clear()
    yield GPU
    tuning.measured.cache_clear()


def sizes_of(op: str) -> dict[str, workloads.Call]:
    """Sizes of an op, of lists the smallest."""
    return {name: call for name, call in workloads.sizes_of(op).items() if name == LISTS.get(op, name)}


def first_size(op: str) -> dict[str, workloads.Call]:
    """The first of them alone."""
    return dict(list(sizes_of(op).items())[:1])


# -- launches and choices ------------------------------------------------------------------------------------------


def space_names(op: str) -> list[str]:
    module = importlib.import_module(f"headway.kernels.triton.{op}")
    return [x.name for x in vars(module).values() if isinstance(x, Space) and x.name.startswith(op)]


@pytest.mark.parametrize("op", workloads.OPS)
def test_every_kernel_goes_by_a_space_whatever_is_chosen(op: str) -> None:
    from headway.kernels.triton.measuring import launched

    spaces: dict[str, set[Any]] = defaultdict(set)
    names = space_names(op)
    for target, number in (("sm_80", 0), ("sm_90a", 1), ("gfx942", 2)):
        with tuning.forced(target, **dict.fromkeys(names, number)):
            for call in sizes_of(op).values():
                for launch in launched(call, META):
                    spaces[launch.name].add(launch.choice and launch.choice.space)
                    assert (
                        launch.choice is None
                        or launch.choice.config.options.items() <= launch.options.items()
                    )
    assert all(found == {None} or None not in found for found in spaces.values()), spaces
    assert {name for found in spaces.values() for name in found} >= set(names), (
        "a space that no size launches"
    )
    unmeasured = {name for name, found in spaces.items() if found == {None}}
    assert unmeasured <= {"lamb_norms_kernel", "linear_attention_rows_kernel"}


@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_is_measured_as_often_as_it_is_launched(target: str) -> None:
    from headway.kernels.triton.measuring import measure_all

    seen: list[tuple[str, str, int]] = []

    def measure(launch: Any) -> float:
        assert launch.choice.config.options.items() <= launch.options.items()
        seen.append((launch.choice.entry, launch.name, launch.choice.number))
        return 0.5 + launch.choice.number

    rows = measure_all(first_size("norm"), META, target=target, measure=measure)
    assert [row.entry for row in rows] == ["norm_forward width=1024", "norm_backward width=1024"]
    for row in rows:
        kernel = row.entry.split()[0] + "_kernel"
        count = len(row.configs)
        assert row.configs == next(s for s in _norm_spaces() if row.entry.startswith(s.name)).of(
            target, width=1024
        )
        assert [x for x in seen if x[1] == kernel] == [
            (row.entry, kernel, n) for n in range(count) for _ in range(2)
        ]
        assert row.seconds == [[2 * (0.5 + n)] for n in range(count)]
        assert row.fastest == 0


def _norm_spaces() -> tuple[Space, Space]:
    from headway.kernels.triton.norm import BACKWARD, FORWARD

    return FORWARD, BACKWARD


def test_a_bound_of_registers_is_nvidias_and_leaves_room_for_a_program() -> None:
    from headway.kernels.triton import map_configs

    assert "maxnreg" not in Config({"R": 8}).options
    for target in TARGETS:
        for config in map_configs.KEYS.of(target, width=64, itemsize=4):
            assert config.options.get("maxnreg") == (None if target == "gfx942" else 255)
            assert 32 * config.warps * (config.registers or 0) <= 65536, "registers of a multiprocessor"


def test_what_cannot_be_launched_is_never_chosen() -> None:
    from triton.runtime.errors import OutOfResources

    from headway.kernels.triton.measuring import measure_all

    def measure(launch: Any) -> float:
        if launch.choice.number == (0 if "forward" in launch.name else 1):
            raise OutOfResources(100, 10, "shared memory")
        return 1.0

    forward, backward = measure_all(first_size("norm"), META, target="sm_80", measure=measure)
    assert forward.seconds == [[math.inf], [2.0]]
    assert forward.fastest == 1
    assert backward.seconds == [[2.0], [math.inf]]
    assert backward.fastest == 0


def test_a_size_that_does_not_fit_is_told_and_left_out() -> None:
    from headway.kernels.triton.measuring import measure_all

    def too_large(device: torch.device) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.warns(UserWarning, match="large: not measured, it does not fit"):
        rows = measure_all({"large": too_large} | first_size("norm"), META, measure=lambda launch: 1.0)
    assert len(rows) == 2


def test_launches_are_carried_out_on_a_device_and_can_be_again() -> None:
    from triton.runtime.jit import KernelInterface

    from headway.kernels.triton.measuring import measure_all

    class Doubling(KernelInterface[Any]):
        """Stands for a kernel, on the CPU."""

        __name__, arg_names = "doubling", ("x", "y", "R", "num_warps", "num_stages")

        def run(self, x: Any, y: Any, *, grid: Any, warmup: bool, **options: Any) -> None:
            assert not warmup
            assert grid == (64 // options["R"],)
            y.copy_(2 * x)

    drawn = []

    def call(device: torch.device) -> None:
        x = workloads.normal(device, 64).detach()
        config = SIDE.choose(device, width=64)
        Doubling()[lambda named: (64 // named["R"],)](x, torch.zeros_like(x), **config.options)

    def measure(launch: Any) -> float:
        x, y = launch.tensors
        assert torch.equal(y, 2 * x)
        y.zero_()
        launch.run()
        assert torch.equal(y, 2 * x)
        drawn.append(x)
        return 1.0

    before = torch.get_rng_state()
    (row,) = measure_all({"64": call}, torch.device("cpu"), measure=measure)
    assert row.seconds == [[1.0]] * 3
    assert all(torch.equal(x, drawn[0]) for x in drawn), "the same operands for every configuration"
    assert torch.equal(torch.get_rng_state(), before)


# -- what is chosen ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "fastest"),
    [
        ([[1.0], [0.98], [0.99]], 0),  # no more than chance
        ([[1.0], [0.96], [0.9]], 2),
        ([[1.0, 1.0], [0.5, 2.1], [0.9, 0.95]], 2),  # sizes count alike: 1.02 and 0.92
        ([[1e-6, 1.0], [0.5e-6, 1.1], [1e-6, 0.9]], 1),
        ([[math.inf], [math.inf], [3.0]], 2),
        ([[math.inf], [math.inf], [math.inf]], 0),
    ],
)
def test_a_default_is_replaced_by_what_is_clearly_faster(seconds: list[list[float]], fastest: int) -> None:
    from headway.kernels.triton.measuring import Measured

    assert Measured("side width=64", SIDE.of("sm_80", width=64), seconds).fastest == fastest


def test_choices_are_kept_and_taken(gpu) -> None:
    two, three = SIDE.of("sm_80", width=64)[1:]
    assert SIDE.choose(gpu, width=64) == SIDE.of("sm_80", width=64)[0]
    file = tuning.remember(gpu, {"side width=64": three, "other": two})
    assert file == tuning.cache_file()
    tuning.remember(gpu, {"side width=64": two})
    assert SIDE.choose(gpu, width=64) == two
    assert SIDE.choose(gpu, width=128) == SIDE.of("sm_80", width=128)[0]
    assert tuning.known() == {"GPU of a test": {"side width=64": two.options, "other": two.options}}
    with tuning.forced(side=2):
        assert SIDE.choose(gpu, width=64) == three


def test_what_a_space_no_longer_has_is_not_taken(gpu) -> None:
    tuning.remember(gpu, {"side width=64": Config({"R": 7}, 4, 1)})
    assert SIDE.choose(gpu, width=64) == SIDE.of("sm_80", width=64)[0]


@pytest.mark.parametrize("text", ['{"NVIDIA', "[]", '{"NVIDIA": 3}'])
def test_a_damaged_cache_is_told_and_defaults_are_taken(tmp_path, monkeypatch, text) -> None:
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path))
    assert tuning.known() == {}
    tuning.cache_file().write_text(text)
    with pytest.warns(UserWarning, match=r"kernels\.json: choices of tiles are not used: .*; remove it"):
        assert tuning.known() == {}
