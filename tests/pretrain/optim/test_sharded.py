"""Steps and norms of parameters that are spread over four ranks are those of whole parameters.

The test starts this file as four processes over gloo; every rank checks its own share.
"""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

RANKS = 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 32), nn.Linear(32, 12)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """Odd sizes, so that shares are uneven and some ranks hold nothing of some parameter."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(30, 12)
        self.blocks = nn.Sequential(Block(), Block())
        self.odd = nn.Linear(12, 3)

    def forward(self, ids):
        return self.odd(self.blocks(self.tokens(ids))).square().mean()


def spread(model, meshes, layout):
    """The model's parameters as DTensors, by FSDP2, or tensor parallel and FSDP2 together."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    flat, square = meshes
    mesh = {"fsdp": flat, "hsdp": square, "tensor": square["shard"], "mixed": flat}[layout]
    for block in model.blocks:
        if layout == "tensor":
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(block, square["tensor"], plan)
        # In `mixed`, as with experts, some parameters live on another mesh than the rest.
        fully_shard(block, mesh=square["shard"] if layout == "mixed" else mesh)
    fully_shard(model, mesh=mesh)
    return model


def whole_grad(p):
    return p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad


def compare(layout, meshes):
    """Muon for the blocks' matrices, AdamW for the rest, clipped: two steps, here and on whole parameters."""
    from headway.pretrain.config import Optimizer
    from headway.pretrain.optim.build import build_optimizers, set_rate
    from headway.pretrain.optim.clipping import clip_factor, global_norm, scale_gradients_

    torch.manual_seed(0)
    reference = Model().double()
    model = spread(copy.deepcopy(reference), meshes, layout)
    settings = Optimizer(name="muon", lr=1e-2, muon_lr=0.1)
    for step in range(2):
        if step == 0:
            optimizers = [build_optimizers(m.named_parameters(), settings) for m in (reference, model)]
        ids = torch.randint(0, 30, (8, 5), generator=torch.Generator().manual_seed(step))
        norms = []
        for m, opts in zip((reference, model), optimizers, strict=True):
            m.zero_grad()
            m(ids).backward()
            norms.append(global_norm(m.parameters()))
            scale_gradients_(m.parameters(), clip_factor(norms[-1], 1e-3))
            set_rate(opts, 0.5)
            for optimizer in opts:
                optimizer.step()
        # fp64: sums in another order, and Muon's iteration, multiply roundings of 1e-16 by some hundreds.
        torch.testing.assert_close(norms[1], norms[0], rtol=1e-12, atol=0)
        for (key, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
            error = (a.full_tensor() - b).abs().max().item()
            assert error < 1e-11, (layout, step, key, error)


def pending_sums(mesh):
    """A gradient whose sum over ranks is pending counts by its sum."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    from headway.pretrain.optim.clipping import global_norm

    p = nn.Parameter(DTensor.from_local(torch.zeros(3), mesh, [Replicate()]))
    p.grad = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    torch.testing.assert_close(global_norm([p]), torch.tensor(RANKS * 3**0.5))


def main(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    from torch.distributed.device_mesh import init_device_mesh

    flat = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("all",))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    for layout in ("fsdp", "hsdp", "tensor", "mixed"):
        compare(layout, (flat, square))
    pending_sums(flat)
    dist.destroy_process_group()


@pytest.mark.slow
def test_spread_parameters_take_the_steps_of_whole_ones(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path / "store")]
    ranks = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(RANKS)
    ]
    errors = [process.communicate(timeout=240)[1] for process in ranks]
    assert all(process.returncode == 0 for process in ranks), "\n".join(errors)


if __name__ == "__main__":
    main(int(sys.argv[2]), sys.argv[1])
