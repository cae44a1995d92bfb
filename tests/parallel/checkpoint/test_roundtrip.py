"""One process: what is saved comes back to the last bit, and the files are what other libraries expect."""

import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch

from headway.parallel import checkpoint
from headway.parallel.checkpoint import publish
from headway.parallel.checkpoint.load import load
from headway.parallel.checkpoint.manifest import read_manifest
from headway.parallel.checkpoint.retention import latest
from headway.parallel.checkpoint.save import Checkpointer
from headway.parallel.checkpoint.verify import verify
from headway.pretrain.engine import State
from headway.pretrain.errors import CheckpointError

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
WHOLE = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
SHAPES = ((7, 3), (5,), (), (0, 4), (1, 1, 2))


def every_dtype() -> State:
    """A tensor of each dtype and shape with arbitrary bits (NaNs with payloads among them)."""
    state, generator = State(), torch.Generator().manual_seed(0)
    for dtype in FLOATS + WHOLE:
        for shape in SHAPES:
            size = torch.Size(shape).numel() * dtype.itemsize
            raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
            state.tensors[f"{dtype}.{list(shape)}"] = raw.view(dtype).reshape(shape)
    state.tensors["bool"] = torch.tensor([[True, False], [False, True]])
    state.tensors["transposed"] = torch.randn(6, 4, generator=generator).t()
    state.tensors["parameter"] = torch.nn.Parameter(torch.randn(3, 3, generator=generator))
    state.numbers = {
        "step": 3,
        "scale": 65536.0,
        "lr": 0.1 + 0.2,
        "cursor": {"epoch": [1, 2**80]},
        "none": None,
    }
    return state


def blank(state: State) -> State:
    return State({name: torch.zeros_like(tensor) for name, tensor in state.tensors.items()})


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def save(folder: Path, step: int, state: State, **kwargs) -> Path:
    with Checkpointer(folder, background=False, **kwargs) as checkpointer:
        checkpointer.save(step, state, {"run": {"name": "test"}})
    assert checkpointer.problems == []
    return checkpointer.published[-1]


@pytest.mark.parametrize("background", [True, False])
def test_every_dtype_comes_back_bitwise(tmp_path, background):
    state = every_dtype()
    with Checkpointer(tmp_path, background=background) as checkpointer:
        checkpointer.save(3, state, {"model": {"layers": 2}})
    assert checkpointer.problems == []
    path = latest(tmp_path)
    assert path == tmp_path / "step_00000003"
    assert (tmp_path / "LATEST").read_text() == "step_00000003\n"
    assert verify(path) == []
    fresh = blank(state)
    numbers = load(path, fresh)
    assert numbers == state.numbers
    assert type(numbers["scale"]) is float
    for name, tensor in state.tensors.items():
        assert bits(fresh.tensors[name]) == bits(tensor), name
    assert read_manifest(path).job == {"model": {"layers": 2}}


def test_files_are_those_of_safetensors(tmp_path):
    """Byte for byte what the safetensors library itself writes, so that any of its readers takes them."""
    state = every_dtype()
    path = save(tmp_path / "ours", 1, state)
    shard = path / "shard_00000.safetensors"
    theirs = tmp_path / "theirs.safetensors"
    # Tensors without elements have no piece and so no bytes here.
    full = {name: t.detach().contiguous() for name, t in state.tensors.items() if t.numel()}
    safetensors.torch.save_file(full, theirs)
    assert shard.read_bytes() == theirs.read_bytes()


def test_background_copy_is_the_moment_of_saving(tmp_path):
    """What training does to tensors and numbers after `save` returns is not in the checkpoint."""
    state = State({"w": torch.arange(1 << 20, dtype=torch.float32)}, {"cursor": {"row": 1}})
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        state.tensors["w"].zero_()
        state.numbers["cursor"]["row"] = 2
        checkpointer.save(2, state)  # one in flight: waits for it, then reuses its buffer
    fresh = State({"w": torch.empty(1 << 20)})
    assert load(tmp_path / "step_00000001", fresh) == {"cursor": {"row": 1}}
    assert torch.equal(fresh.tensors["w"], torch.arange(1 << 20, dtype=torch.float32))
    assert load(tmp_path / "step_00000002", fresh) == {"cursor": {"row": 2}}
    assert not fresh.tensors["w"].any()
    assert [path.name for path in checkpointer.published] == ["step_00000001", "step_00000002"]


def test_state_may_change_its_layout_between_saves(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, State({"w": torch.ones(4)}))
        checkpointer.save(2, State({"w": torch.ones(4, 2), "b": torch.ones(3)}))
    assert checkpointer.problems == []
    assert read_manifest(tmp_path / "step_00000001").tensors["w"].shape == (4,)
    assert read_manifest(tmp_path / "step_00000002").tensors["w"].shape == (4, 2)


@pytest.mark.parametrize("exchange", [publish.exchange, lambda one, other: False])
def test_same_step_again_replaces_it(tmp_path, monkeypatch, exchange):
    """Also on file systems that cannot swap two folders in one step."""
    monkeypatch.setattr(publish, "exchange", exchange)
    save(tmp_path, 5, State({"w": torch.zeros(3)}))
    path = save(tmp_path, 5, State({"w": torch.ones(3)}))
    fresh = State({"w": torch.zeros(3)})
    load(path, fresh)
    assert fresh.tensors["w"].tolist() == [1, 1, 1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "owner.json", "step_00000005"]


def test_mismatches_name_the_tensor_and_both_values(tmp_path):
    path = save(tmp_path, 1, State({"w": torch.ones(2, 3), "v": torch.ones(4)}))
    live = torch.zeros(2, 3)
    for tensors, text in (
        ({"w": torch.zeros(3, 2), "v": torch.zeros(4)}, r"tensor w: shape \[2, 3\].*\[3, 2\]"),
        ({"w": torch.zeros(2, 3).double(), "v": torch.zeros(4)}, r"tensor w: dtype float32.*float64"),
        ({"w": live, "v": torch.zeros(4), "u": live}, "tensor u is missing in the checkpoint"),
        ({"w": live}, "tensor v of the checkpoint is not in the run"),
    ):
        with pytest.raises(CheckpointError, match=text):
            load(path, State(tensors))
    assert not live.any(), "nothing is written before everything is checked"
    load(path, State({"w": live, "u": torch.zeros(1)}), strict=False)
    assert live.all()
    live.zero_()
    load(path, State({"w": live, "optimizer.w": torch.zeros(1)}), names=lambda name: name == "w")
    assert live.all()


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (State({"c": torch.zeros(2, dtype=torch.complex64)}), "tensor c: a checkpoint cannot hold complex64"),
        (State({}, {"loss": float("nan")}), "numbers.loss = nan"),
        (State({}, {"a": [{"b": torch.zeros(1)}]}), r"numbers.a\[0\].b = .*Tensor is no JSON value"),
        (State({}, {"a": {1: 2}}), "numbers.a: key 1 is no string"),
        (State({"a": torch.ones(4), "a[0:4]": torch.ones(4)}), None),
    ],
)
def test_states_that_cannot_be_saved(tmp_path, state, text):
    with Checkpointer(tmp_path, background=False) as checkpointer:
        if text is None:
            checkpointer.save(1, state)
            assert checkpointer.problems == []
        else:
            with pytest.raises(CheckpointError, match=text):
                checkpointer.save(1, state)


def test_nothing_is_pickled(tmp_path):
    """Neither in the code (the object collectives pickle too) nor in what it leaves on disk."""
    folder = Path(checkpoint.__file__).parent
    banned = r"pickle|torch\.(save|load)\b|_object|torch\.distributed\.checkpoint|marshal|shelve|dill"
    for file in folder.glob("*.py"):
        code = re.sub(r'"""[\s\S]*?"""', "", file.read_text())
        assert not re.findall(banned, code), file
    path = save(tmp_path, 1, every_dtype())
    for file in (p for p in tmp_path.rglob("*") if p.is_file() and p.name != "LATEST"):
        if file.suffix == ".json":
            json.loads(file.read_text())
        else:
            assert file.suffix == ".safetensors"
            with safetensors.safe_open(file, framework="pt") as shard:
                assert shard.keys()
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "shard_00000.safetensors"]


def test_a_deferred_save_holds_the_values_of_its_step(tmp_path):
    """The copy may be late, but not later than `copied`: what changes after it is not saved."""
    live = State({"w": torch.arange(300_000, dtype=torch.float32)})
    with Checkpointer(tmp_path) as saver:
        for step in range(3):
            live.tensors["w"].fill_(step)
            saver.save(step, live, deferred=True)
            saver.copied()
            live.tensors["w"].fill_(-1)
            assert saver.wait()
            read = State({"w": torch.zeros(300_000)})
            load(saver.published[-1], read)
            assert (read.tensors["w"] == step).all()


def test_a_deferred_save_without_memory_is_told_and_lets_go(tmp_path, monkeypatch):
    def no_memory(*_):
        raise MemoryError("none left")

    with Checkpointer(tmp_path) as saver:
        monkeypatch.setattr(saver._buffer, "fill", no_memory)
        saver.save(1, State({"w": torch.zeros(3)}), deferred=True)
        saver.copied()
        assert not saver.wait()
        assert "none left" in str(saver.problems[0])
