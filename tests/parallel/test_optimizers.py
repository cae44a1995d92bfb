"""LAMB, Adafactor and the average of weights on parameters that are spread: as on whole ones."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from headway.parallel.checkpoint.layout import held
from headway.parallel.checkpoint.load import load
from headway.parallel.checkpoint.save import Checkpointer
from headway.pretrain.config import Optimizer
from headway.pretrain.engine import State
from headway.pretrain.optim.average import Average
from headway.pretrain.optim.build import allocate_state, build_optimizers, set_rate

STEPS = 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 32), nn.Linear(32, 12)
        self.experts = nn.Parameter(torch.randn(4, 12, 5))

    def forward(self, x):
        mixed = torch.einsum("bse,xef,xgf->bsg", x, self.experts, self.experts)
        return x + self.down(torch.relu(self.up(x))) + mixed / 60


class Model(nn.Module):
    """Odd sizes, so that shares are uneven and some ranks hold nothing of some parameter."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(31, 12)
        self.blocks = nn.Sequential(Block(), Block())
        self.odd = nn.Linear(12, 2)

    def forward(self, ids):
        return self.odd(self.blocks(self.embed(ids))).square().mean()


def spread(model, layout, world):
    """Sharded by FSDP2, in replicas, or under tensor parallelism too: rows and columns are then both cut."""
    if layout == "fsdp":
        mesh = init_device_mesh("cpu", (world,))
    else:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        mesh = square if layout == "hsdp" else square["a"]
    for block in model.blocks:
        if layout == "tensor":
            parallelize_module(block, square["b"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return model


def models(layout, world):
    torch.manual_seed(0)
    reference = Model().double()
    return reference, spread(copy.deepcopy(reference), layout, world)


def train(model, optimizers, step):
    ids = torch.randint(0, 31, (8, 5), generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    model(ids).backward()
    set_rate(optimizers, 1 / (1 + step))
    for optimizer in optimizers:
        optimizer.step()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(rank, world, name, layout):
    """Largest deviation of weights from those of one device, and the collectives of a step."""
    pair = models(layout, world)
    settings = Optimizer(name=name, lr=1e-2, layer_decay=0.8)
    optimizers = [build_optimizers(m.named_parameters(), settings) for m in pair]
    for step in range(STEPS):
        for model, of in zip(pair, optimizers, strict=True):
            train(model, of, step)
    with CommDebugMode() as messages:  # once more with the same gradients
        optimizers[1][0].step()
    optimizers[0][0].step()
    worst = 0.0
    for one, many in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
        worst = max(worst, float((whole(many) - one).abs().max()))
        mine, theirs = (of[0].state[p] for of, p in zip(optimizers, (one, many), strict=True))
        assert list(mine) == list(theirs)
        held(theirs)  # raises if a checkpoint could not tell which part of the whole is here
        for key, value in mine.items():
            assert theirs[key].shape == value.shape
            torch.testing.assert_close(whole(theirs[key]), value, rtol=1e-11, atol=1e-18)
    return worst, messages.get_total_counts()


LAYOUTS = [(3, "fsdp"), (4, "hsdp"), (4, "tensor")]


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS)
@pytest.mark.parametrize("name", ["lamb", "adafactor"])
def test_steps_and_state_are_those_of_whole_parameters(pool, name, ranks, layout):
    for worst, messages in pool(compare, ranks=ranks, name=name, layout=layout):
        # fp64: sums in another order, five steps of 1e-2 in weights of size 1.
        assert worst < 1e-13
        if layout == "fsdp":  # of 15 parameters
            assert messages == {"lamb": 1, "adafactor": 3}[name]


def resume(rank, world, name, layout, folder, written):
    """Weights, whole, after two steps, a checkpoint and two more; from the checkpoint alone if it is written."""
    _, model = models(layout, world)
    (optimizer,) = build_optimizers(model.named_parameters(), Optimizer(name=name, lr=1e-2))
    allocate_state(optimizer)
    state = State(dict(model.named_parameters()))
    for key, p in model.named_parameters():
        state.tensors |= {f"optimizer.{key}.{k}": value for k, value in optimizer.state[p].items()}
    if written:
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        load(Path(folder) / "step_00000002", state)
    else:
        train(model, [optimizer], 0)
        train(model, [optimizer], 1)
        with Checkpointer(Path(folder)) as checkpointer:
            checkpointer.save(2, state)
    train(model, [optimizer], 2)
    train(model, [optimizer], 3)
    return {key: whole(p.detach()).numpy() for key, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["lamb", "adafactor"])
def test_a_checkpoint_resumes_bitwise_and_at_other_layouts(pool, tmp_path, name):
    straight = pool(resume, ranks=3, name=name, layout="fsdp", folder=str(tmp_path), written=False)[0]
    for ranks, layout in LAYOUTS:
        resumed = pool(resume, ranks=ranks, name=name, layout=layout, folder=str(tmp_path), written=True)[0]
        for key, value in straight.items():
            if layout == "fsdp":
                assert (resumed[key] == value).all()
            else:  # sums in another order
                assert resumed[key] == pytest.approx(value, rel=0, abs=1e-13)


def average_of_shards(rank, world):
    reference, model = models("fsdp", world)
    modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
    averages = [
        Average(reference.named_parameters(), 0.9),
        Average(model.named_parameters(), 0.9, changed=lambda: [m.reshard() for m in modules]),
    ]
    optimizers = [build_optimizers(m.named_parameters(), Optimizer(lr=1e-2)) for m in (reference, model)]
    ids = torch.arange(10).view(2, 5)
    for step in range(STEPS):
        for m, of, average in zip((reference, model), optimizers, averages, strict=True):
            train(m, of, step)
            average.update()
    found = []
    for m, average in zip((reference, model), averages, strict=True):
        with torch.no_grad():
            before = m(ids)  # the root stays gathered after this
            with average.swapped():
                within = m(ids)
            after = m(ids)
        assert torch.equal(before, after)
        found.append((before.item(), within.item()))
    for name, tensor in averages[1].state().items():
        torch.testing.assert_close(whole(tensor), averages[0].state()[name], rtol=0, atol=1e-13)
    held(averages[1].state())
    return found


def test_averages_of_shards_evaluate_as_averages_of_whole_parameters(pool):
    for alone, spread_out in pool(average_of_shards, ranks=3):
        assert spread_out == pytest.approx(alone, rel=1e-12)
        assert alone[0] != pytest.approx(alone[1], rel=1e-3)  # the averages are other weights
