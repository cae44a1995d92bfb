"""Several ranks: whatever layout wrote a checkpoint, any other layout loads it, to the last bit.

The oracle of every layout is torch's own `distribute_tensor`, `fully_shard` and `parallelize_module`.
"""

import errno
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import Partial, _StridedShard

from headway.parallel.checkpoint import parts, save
from headway.parallel.checkpoint.fragments import Fragment
from headway.parallel.checkpoint.layout import held
from headway.parallel.checkpoint.load import load
from headway.parallel.checkpoint.manifest import read_manifest
from headway.parallel.checkpoint.retention import latest
from headway.parallel.checkpoint.save import Checkpointer
from headway.parallel.checkpoint.verify import verify
from headway.pretrain.engine import State
from headway.pretrain.errors import CheckpointError

FLAT = ("flat",)
LAYOUTS = {
    "plain": ((1,), None),
    "plain on 3": ((3,), None),
    "shard 2": ((2,), (Shard(0),)),
    "shard 3": ((3,), (Shard(0),)),
    "columns 3": ((3,), (Shard(1),)),
    "interleaved 3": ((3,), (_StridedShard(0, split_factor=2),)),
    "replicate 2 x shard 2": ((2, 2), (Replicate(), Shard(0))),
    "both axes on one dim": ((2, 2), (Shard(0), Shard(0))),
    "FSDP2 over tensor": ((2, 2), (_StridedShard(0, split_factor=2), Shard(0))),
    "grid 2 x 2": ((2, 2), (Shard(1), Shard(0))),
    "flat 2": ((2,), FLAT),
    "flat 3": ((3,), FLAT),
    "flat 2 of columns": ((2, 2), FLAT),
}
"""Name -> mesh shape and placements; None leaves plain tensors, equal on all ranks; FLAT are runs of elements, along
the first axis, of a tensor of which the second axis cuts the last dim."""

SHAPES = {
    "w": (7, 5),  # no number of ranks divides it
    "exp_avg.w": (7, 5),
    "even": (16, 6),
    "bias": (3,),
    "tiny": (1, 2),  # most ranks hold nothing of it
    "empty": (0, 4),
    "cube": (5, 4, 3),
}


def reference() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tensors["even"] = tensors["even"].to(torch.bfloat16)
    return tensors


def plain() -> dict[str, torch.Tensor]:
    return {"step": torch.tensor(12.0), "count": torch.tensor([2**40, -1])}


def spread(full: dict[str, torch.Tensor], layout: str) -> State:
    """The tensors at a layout; dims that a tensor lacks are replicated."""
    sizes, placements = LAYOUTS[layout]
    state = State({name: tensor.clone() for name, tensor in full.items()})
    if placements == FLAT:
        state.tensors = {name: fragment(tensor, *sizes) for name, tensor in full.items()}
    elif placements:
        mesh = init_device_mesh("cpu", sizes)
        for name, tensor in state.tensors.items():
            fitting = [
                p if isinstance(p, Replicate) or p.dim < tensor.ndim else Replicate() for p in placements
            ]
            # No source rank: every rank cuts its share out of what all of them have.
            state.tensors[name] = distribute_tensor(tensor, mesh, fitting, src_data_rank=None)
    state.tensors |= plain()
    state.numbers = {"layout": layout}
    return state


def fragment(full: torch.Tensor, runs: int, columns: int = 1) -> Fragment:
    """This rank's run of this rank's columns; runs are as long as each other but for the last."""
    rank = dist.get_rank()
    width = -(-full.shape[-1] // columns)
    first = min(rank % columns * width, full.shape[-1])
    part = full[..., first : first + width]
    length = -(-part.numel() // runs)
    start = min(rank // columns * length, part.numel())
    run = part.reshape(-1)[start : start + length].clone()
    return Fragment(run, tuple(full.shape), (*(0,) * (full.dim() - 1), first), tuple(part.shape), start)


def local(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, Fragment):
        return tensor.run
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save_all(rank, world, folder):
    for layout, (sizes, _) in LAYOUTS.items():
        if torch.Size(sizes).numel() == world:
            with Checkpointer(Path(folder) / layout) as checkpointer:
                checkpointer.save(1, spread(reference(), layout))
                checkpointer.save(2, spread(reference(), layout))
            assert checkpointer.problems == []


def load_all(rank, world, folder):
    loads = 0
    for layout, (sizes, _) in LAYOUTS.items():
        if torch.Size(sizes).numel() != world:
            continue
        expected = spread(reference(), layout)
        for written in LAYOUTS:
            state = spread({name: torch.full_like(t, -7) for name, t in reference().items()}, layout)
            assert load(Path(folder) / written / "step_00000002", state) == {"layout": written}
            for name, tensor in expected.tensors.items():
                assert torch.equal(local(state.tensors[name]), local(tensor)), (written, layout, name)
            loads += 1
    return loads


def test_every_layout_loads_at_every_layout(pool, tmp_path):
    for ranks in (1, 2, 3, 4):
        pool(save_all, ranks=ranks, folder=str(tmp_path))
    loads = 0
    for ranks in (1, 2, 3, 4):
        loads += pool(load_all, ranks=ranks, folder=str(tmp_path))[0]
    assert loads == len(LAYOUTS) ** 2
    for layout in LAYOUTS:
        path = latest(tmp_path / layout)
        assert verify(path) == []
        # Each element is on disk once, however many ranks hold it. (Every header is larger than 8 bytes.)
        manifest = read_manifest(path)
        data = sum(t.nbytes for t in (reference() | plain()).values())
        heads = sum(8 + int.from_bytes((path / f).read_bytes()[:8], "little") for f in manifest.files)
        assert manifest.nbytes == data + heads


def balance(rank, world, folder):
    state = State({f"t{i}": torch.full((i + 1, 1000), float(i)) for i in range(12)})
    with Checkpointer(Path(folder)) as checkpointer:
        checkpointer.save(1, state)


def test_replicated_tensors_are_written_by_all_ranks_evenly(pool, tmp_path):
    pool(balance, ranks=3, folder=str(tmp_path))
    sizes = [file.bytes for file in read_manifest(latest(tmp_path)).files.values()]
    assert len(sizes) == 3
    # Largest first: no rank exceeds another by more than the smallest tensor it could have taken (here 4 KB).
    assert max(sizes) - min(sizes) < 4000 + 1000


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 14), nn.Linear(14, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        return self.norm(self.down(self.up(x).relu()))


def trained(kind: str) -> tuple[nn.Module, State]:
    """A module at a real layout after a step of AdamW, and its weights and moments."""
    torch.manual_seed(0)
    model = Two()
    if kind == "fsdp over tensor":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
        parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(model, mesh=mesh["shard"])
    elif kind == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    elif kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (3,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()
    tensors = dict(model.named_parameters())
    for name, parameter in model.named_parameters():
        tensors |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items()}
    return model, State(tensors, {"kind": kind})


def save_trained(rank, world, folder, kind):
    _, state = trained(kind)
    with Checkpointer(Path(folder)) as checkpointer:
        checkpointer.save(1, state)
    assert checkpointer.problems == []
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().numpy()
        for name, tensor in state.tensors.items()
    }


def load_trained(rank, world, path, kind):
    _, state = trained(kind)
    for tensor in state.tensors.values():
        local(tensor.detach()).fill_(-7)
    load(Path(path), state)
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().numpy()
        for name, tensor in state.tensors.items()
    }


@pytest.mark.filterwarnings("ignore:.*redistribute.*")
def test_weights_and_moments_of_real_modules(pool, tmp_path):
    kinds = {"one": 1, "fsdp": 3, "hsdp": 4, "fsdp over tensor": 4}
    for written, ranks in kinds.items():
        whole = pool(save_trained, ranks=ranks, folder=str(tmp_path / written), kind=written)[0]
        path = latest(tmp_path / written)
        for kind in kinds:
            if kind in ("one", "fsdp over tensor") or written == "fsdp over tensor":
                for found in pool(load_trained, ranks=kinds[kind], path=str(path), kind=kind):
                    assert found.keys() == whole.keys()
                    for name, value in whole.items():
                        assert found[name].tobytes() == value.tobytes(), (written, kind, name)


def boxes(rank, world):
    """Name -> boxes of this rank, each held to that part of the same module on one device."""
    torch.manual_seed(0)
    whole = Two()
    torch.manual_seed(0)
    model = Two()
    mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("shard", "tensor"))
    parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["shard"])
    known, found = dict(whole.named_parameters()), []
    for part in held(dict(model.named_parameters())):
        here = tuple(map(slice, part.box.offset, part.box.stop))
        assert torch.equal(part.view, known[part.name][here]), (part.name, part.box)
        found.append((part.name, part.box.offset, part.box.numel))
    return found, {name: p.numel() for name, p in known.items()}


def test_shards_of_shards_that_are_not_even(pool):
    """Three ranks divide neither of two ranks' shares: torch itself has no right word for where those begin."""
    answers = pool(boxes, ranks=6)
    parts = {(name, begin): size for found, _ in answers for name, begin, size in found}
    for name, size in answers[0][1].items():
        assert sum(n for (other, _), n in parts.items() if other == name) == size


def stages(rank, world, folder):
    """Pipeline stages: each rank has tensors that the others do not know."""
    state = State({f"layer{rank}": torch.full((3,), float(rank)), "shared": torch.ones(2)})
    with Checkpointer(Path(folder)) as checkpointer:
        checkpointer.save(1, state)
        assert checkpointer.wait()
    fresh = State({name: torch.zeros_like(t) for name, t in state.tensors.items()})
    load(Path(folder) / "step_00000001", fresh)
    return all(torch.equal(fresh.tensors[n], t) for n, t in state.tensors.items())


def test_ranks_with_different_tensors(pool, tmp_path):
    assert pool(stages, ranks=3, folder=str(tmp_path)) == [True] * 3
    assert set(read_manifest(latest(tmp_path)).tensors) == {"layer0", "layer1", "layer2", "shared"}


def disagree(rank, world, folder):
    """Whatever one rank finds wrong, all ranks raise, and none waits."""
    texts = []
    checkpointer = Checkpointer(Path(folder))
    checkpointer.save(1, State({"w": torch.ones(4)}))
    assert checkpointer.wait()
    mesh = init_device_mesh("cpu", (world,))
    pending = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    for action in (
        lambda: checkpointer.save(2 + rank, State({"w": torch.ones(4)})),
        lambda: checkpointer.save(2, State({"w": pending if rank else torch.ones(3)})),
        lambda: load(Path(folder) / "step_00000001", State({"w": torch.ones(4 + rank)})),
        lambda: load(Path(folder) / f"step_{rank + 1:08d}", State({"w": torch.ones(4)})),
    ):
        try:
            action()
        except CheckpointError as error:
            texts.append(str(error))
    checkpointer.close()
    return texts


def test_an_error_of_one_rank_is_raised_on_all(pool, tmp_path):
    for rank, texts in enumerate(pool(disagree, ranks=2, folder=str(tmp_path))):
        steps, pending, shape, missing = texts
        assert "ranks save different steps: [2, 3]" in steps
        assert "tensor w: placement Partial" in pending.replace("P(sum)", "Partial(sum)")
        assert "tensor w: shape [4] in the checkpoint, [5] in the run" in shape
        assert "step_00000002/manifest.json: cannot be read: No such file" in missing
        assert ("rank 1 failed" in shape) == (rank == 0)


def load_damaged(rank, world, path):
    state = spread({name: torch.zeros_like(t) for name, t in reference().items()}, "shard 2")
    try:
        load(Path(path), state)
    except CheckpointError as error:
        return str(error), sum(
            local(t).float().abs().sum().item() for n, t in state.tensors.items() if n in SHAPES
        )


def test_a_flipped_bit_in_one_shard_stops_all_ranks(pool, tmp_path):
    pool(save_all, ranks=3, folder=str(tmp_path))
    shard = tmp_path / "shard 3" / "step_00000002" / "shard_00002.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    for text, written in pool(load_damaged, ranks=2, path=str(shard.parent)):
        assert f"{shard}: sha256 is" in text
        assert f"The checkpoint before it is {shard.parent.with_name('step_00000001')}" in text
        assert written == 0


def faults(rank, world, folder):
    """Rank 1 runs out of disk, then says nothing at all, then is well again."""
    state = State({f"w{i}": torch.full((1000,), float(i)) for i in range(4)})
    write_shard, tell, problems = save.write_shard, parts.tell, []

    def full(path, *_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with Checkpointer(Path(folder), timeout=0.3) as checkpointer:
        checkpointer.save(1, state)
        try:
            save.write_shard = full if rank == 1 else write_shard
            checkpointer.save(2, state)
            assert not checkpointer.wait()
            save.write_shard = write_shard
            problems.append([str(p) for p in checkpointer.problems])
            parts.tell = (lambda *_: None) if rank == 1 else tell
            checkpointer.save(3, state)
            assert not checkpointer.wait()
            problems.append([str(p) for p in checkpointer.problems[len(problems[0]) :]])
        finally:
            save.write_shard, parts.tell = write_shard, tell
        checkpointer.save(4, state)
    return problems, [path.name for path in checkpointer.published]


def test_a_rank_that_fails_or_falls_silent(pool, tmp_path):
    (zero, published), (one, _) = pool(faults, ranks=2, folder=str(tmp_path))
    good = tmp_path / "step_00000001"
    assert len(zero[0]) == len(zero[1]) == len(one[0]) == 1
    assert "step 2 was not saved: rank 1 failed" in zero[0][0]
    for text in (zero[0][0], one[0][0]):
        assert "No space left on device" in text
        assert "It takes 8,000 bytes" in text
        assert "bytes are free there" in text
        assert f"The last good checkpoint is {good}" in text
    assert "no word from 1 of 2 ranks for 0.3 s: 1." in zero[1][0]
    assert published == ["step_00000001", "step_00000004"]
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["LATEST", "owner.json", "step_00000001", "step_00000004"]
    assert latest(tmp_path) == tmp_path / "step_00000004"
    assert verify(tmp_path / "step_00000004") == []
