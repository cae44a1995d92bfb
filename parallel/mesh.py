"""The mesh: how many ranks along each axis, and which process is where.

Axes, outermost first: pipeline, replicate, shard, context, tensor. The experts' mesh has the same ranks in the same
order, with shard x context x tensor cut into copies x expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from headway.parallel.peers import Peers
from headway.parallel.roll import meet
from headway.pretrain.config import Job, Parallel
from headway.pretrain.data.ramp import BatchSizes
from headway.pretrain.errors import JobError

AXES = ("pipeline", "replicate", "shard", "context", "tensor")
ROWS = ("replicate", "shard")
"""Axes along which ranks read different rows."""
PARTS = ("replicate", "shard", "context")
"""Axes along which ranks compute different parts of the loss; what is reduced along them is a sum."""


@dataclass(frozen=True)
class Layout:
    """Ranks along each axis."""

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def fold(self) -> int:
        """Ranks over which experts may be spread: shard x context x tensor."""
        return self.shard * self.context * self.tensor

    @property
    def data(self) -> int:
        """Ranks that read different rows."""
        return self.replicate * self.shard

    def __str__(self) -> str:
        named = [f"{axis} {getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1]
        experts = f", experts over {self.expert}" if self.expert > 1 else ""
        return (" x ".join(named) or "one process") + experts


def lay_out(parallel: Parallel, world: int) -> Layout:
    """Fill in the axis of size -1 so that the product is the number of ranks; an expert axis of -1 takes all it can.

    Raises:
        JobError: two axes of -1, a zero, or a product that is not the number of ranks.
    """
    sizes = {axis: getattr(parallel, axis) for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    zero = next((axis for axis in (*AXES, "expert") if getattr(parallel, axis) == 0), None)
    if zero:
        raise JobError(f"parallel.{zero}", 0, "an axis has at least one rank, or -1 to take what is left", 1)
    if len(free) > 1:
        rule = f"only one axis may be -1, and parallel.{free[0]} is already"
        raise JobError(f"parallel.{free[1]}", -1, rule, 1)
    fixed = math.prod(size for size in sizes.values() if size > 0)
    if free and world % fixed == 0:
        sizes[free[0]] = world // fixed
    elif free or fixed != world:
        named = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "all axes 1"
        rule = f"must {'divide' if free else 'be'} the {world} ranks that were started"
        raise JobError("parallel", named, rule, _nearest(sizes, world))
    layout = Layout(**sizes)
    return replace(layout, expert=layout.fold if parallel.expert == -1 else parallel.expert)


def apart(job: Job) -> int:
    """How many ranks are a teacher's alone: none where no teacher computes."""
    settings = job.objective.distill
    live = settings.on and settings.teacher is not None and settings.cache is None
    return job.parallel.teacher.ranks if live else 0


def students(job: Job, ranks: int) -> int:
    """How many of a run's ranks are the student's, where a teacher has some of its own; all otherwise.

    Raises:
        JobError: there are no others, or axes that such a teacher does not go with.
    """
    theirs = apart(job)
    if theirs >= ranks:
        rule = f"leaves the student none of the {ranks} ranks that were started"
        raise JobError("parallel.teacher.ranks", theirs, rule, 0)
    if theirs:
        for axis in ("context", "expert"):
            if (size := getattr(job.parallel, axis)) != 1:
                rule = (
                    "a teacher on ranks of its own goes with the axes pipeline, replicate, shard and tensor"
                )
                raise JobError(f"parallel.{axis}", size, rule, 1)
        if (job.parallel.teacher.context or 1) > 1:
            rule = "a teacher on ranks of its own is spread by tensor, replicate and shard"
            raise JobError("parallel.teacher.context", job.parallel.teacher.context, rule, 1)
    return ranks - theirs


def lay_out_teacher(parallel: Parallel, ours: Layout, ranks: int) -> Layout:
    """A teacher's layout over so many ranks (`parallel.teacher`), by the student's where nothing is said.

    Raises:
        JobError: the axes do not make up the ranks.
    """
    wanted = parallel.teacher
    tensor, context = wanted.tensor or ours.tensor, wanted.context or ours.context
    axes = Parallel(tensor=tensor, context=context, replicate=wanted.replicate, shard=wanted.shard)
    return lay_out(axes, ranks)


def _nearest(sizes: dict[str, int], world: int) -> str:
    """Lower the innermost axes to common divisors and give the rest to `shard`."""
    left, legal = world, {}
    for axis in reversed(AXES):
        legal[axis] = math.gcd(left, max(1, sizes[axis]))
        left //= legal[axis]
    legal["shard"] *= left
    return ", ".join(f"parallel.{axis}={legal[axis]}" for axis in AXES if legal[axis] > 1) or "all axes 1"


def rows_per_micro_batch(job: Job, data_ranks: int) -> int:
    """Rows of a micro-batch; raises JobError if the global batch cannot be cut that way."""
    rows, micro = job.train.global_batch, job.parallel.micro_batch
    if rows % data_ranks:
        rule = f"must be a multiple of the {data_ranks} ranks that read different rows"
        raise JobError("train.global_batch", rows, rule, -(-rows // data_ranks) * data_ranks)
    _check_ramp(job, data_ranks)
    mine = rows // data_ranks
    if micro is None:
        return mine
    if mine % micro:
        legal = [d for d in range(1, mine + 1) if mine % d == 0]
        rule = f"must divide the {mine} rows of a rank (train.global_batch {rows} over {data_ranks} ranks)"
        raise JobError("parallel.micro_batch", micro, rule, min(legal, key=lambda d: abs(d - micro)))
    return micro


def _check_ramp(job: Job, data_ranks: int) -> None:
    """Ranks do as many micro-batches as each other, or they wait for one another for ever: also while a batch
    grows."""
    ramp = job.train.ramp
    if all(stage.rows % data_ranks == 0 for stage in BatchSizes(job.train).stages):
        return
    field, value = (
        ("start", ramp.start or 0) if (ramp.start or 0) % data_ranks else ("increment", ramp.increment)
    )
    rule = f"must be a multiple of the {data_ranks} ranks that read different rows"
    raise JobError(f"train.ramp.{field}", value, rule, -(-value // data_ranks) * data_ranks)


@dataclass
class World:
    """This process among the ranks, and the collectives that the training loop needs."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    backend: str
    layout: Layout
    mesh: DeviceMesh | None
    experts: DeviceMesh | None = None
    """Axes pipeline, replicate, copies, expert; only where experts are spread."""
    everyone: dist.ProcessGroup | None = None
    """Its ranks, where the run has others beside them; None for all."""
    teaches: bool = False
    """Whether these ranks are a teacher's alone."""
    between: dist.ProcessGroup | None = None
    """All ranks of a run whose teacher has some of its own, over gloo: in it a side waits for the other."""
    peers: Peers | None = None
    """All ranks of the run as hosts on a network; None where tests have made the process group."""

    @property
    def main(self) -> bool:
        """Whether this rank writes logs and reports."""
        return self.rank == 0

    def place(self, axis: str) -> int:
        """This rank's number along an axis, from 0."""
        if self.mesh is None or axis not in (self.mesh.mesh_dim_names or ()):
            return 0
        return self.mesh.get_local_rank(axis)

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks that differ from this one along an axis only, which has more than one."""
        assert self.mesh is not None
        return self.mesh.get_group(axis)

    @property
    def data_rank(self) -> int:
        """Which slice of the global batch is this rank's."""
        return self.place("replicate") * self.layout.shard + self.place("shard")

    def sum(self, *values: float, along: Sequence[str] = ROWS) -> list[float]:
        """Sums along some axes, in fp64, the same on all ranks.

        Ranks that differ along other axes only hold the same values; those of the first are taken.
        """
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if any(self.place(axis) for axis in AXES if axis not in along):
            total.zero_()
        dist.all_reduce(total, group=self.everyone)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; all ranks learn the same answer."""
        return flag if self.size == 1 else self.sum(float(flag), along=AXES)[0] > 0

    def named(self, where: Callable[[], str]) -> AbstractContextManager[None]:
        """Name who was lost if a collective in the block fails; `where` says what was being done."""
        return self.peers.named(where) if self.peers else nullcontext()

    def meet(self) -> None:
        """Wait for all ranks of the run, a teacher's too."""
        if dist.is_initialized():
            dist.barrier()

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.everyone)


def start(
    job: Job, layout: Layout, rank: int, size: int, local_rank: int, device: torch.device, backend: str
) -> World:
    """Join the other ranks (MASTER_ADDR and MASTER_PORT say where) and build the mesh.

    Raises:
        StartError: ranks are missing after `parallel.start_timeout` seconds, or the master is.
        JobError: two ranks have the same GPU.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1:
        return World(rank, size, local_rank, device, backend, layout, None)
    if dist.is_initialized():
        return _start(job, layout, rank, size, local_rank, device, backend)
    peers = meet(rank, size, job.parallel.start_timeout, _gpu(device) if backend == "nccl" else "")
    with peers.named(lambda: "connecting to the others"):
        timeout = timedelta(seconds=job.parallel.timeout)
        store = dist.PrefixStore("groups", peers.store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        return replace(_start(job, layout, rank, size, local_rank, device, backend), peers=peers)


def _start(
    job: Job, layout: Layout, rank: int, size: int, local_rank: int, device: torch.device, backend: str
) -> World:
    """Build the mesh, and with it the process groups of its axes."""
    if theirs := apart(job):
        return _start_apart(job, layout, rank, (size - theirs, theirs), local_rank, device, backend)
    experts, mesh = None, _mesh(device.type, layout)
    if layout.expert > 1:
        shape = (layout.pipeline, layout.replicate, layout.fold // layout.expert, layout.expert)
        names = ("pipeline", "replicate", "copies", "expert")
        experts = init_device_mesh(device.type, shape, mesh_dim_names=names)
        experts["copies", "expert"]._flatten("experts")  # sums along both then take one all-reduce
    return World(rank, size, local_rank, device, backend, layout, mesh, experts)


def _gpu(device: torch.device) -> str:
    """What tells a GPU from all others of its host."""
    return str(torch.cuda.get_device_properties(device).uuid)


PATIENCE = timedelta(days=7)
"""How long a teacher waits for a student that compiles, saves or writes its report. A student that is dead does not
keep
it: connections close, and the launcher ends all ranks of a run of which one has failed."""


def _start_apart(
    job: Job,
    layout: Layout,
    rank: int,
    sizes: tuple[int, int],
    local_rank: int,
    device: torch.device,
    backend: str,
) -> World:
    """The student's ranks and, after them, those of its teacher: each side its own mesh, which both sides make."""
    ours, theirs = sizes
    layouts = layout, lay_out_teacher(job.parallel, layout, theirs)
    groups = dist.new_group(list(range(ours))), dist.new_group(list(range(ours, ours + theirs)))
    between = dist.new_group(backend="gloo", timeout=PATIENCE)
    meshes = [_mesh(device.type, one, first) for one, first in zip(layouts, (0, ours), strict=True)]
    side = int(rank >= ours)
    place = rank - ours * side, sizes[side], local_rank, device, backend
    return World(
        *place, layouts[side], meshes[side], everyone=groups[side], teaches=bool(side), between=between
    )


def _mesh(device_type: str, layout: Layout, first: int | None = None) -> DeviceMesh:
    """All ranks, or those from the first on. An axis of one gets no group: with NCCL each takes memory of the device,
    with gloo three threads."""
    axes = tuple(axis for axis in AXES if getattr(layout, axis) > 1 or axis == "shard")
    shape = tuple(getattr(layout, axis) for axis in axes)
    if first is None:
        return init_device_mesh(device_type, shape, mesh_dim_names=axes)
    ranks = torch.arange(first, first + math.prod(shape)).view(shape)
    return DeviceMesh(device_type, ranks, mesh_dim_names=axes)


def beside(world: World, layout: Layout) -> World:
    """The same processes at another layout, for a second model; collective."""
    mesh = None
    if world.size > 1:
        mesh = _mesh(world.device.type, layout)
    return replace(world, layout=layout, mesh=mesh, experts=None)


def stop() -> None:
    """Leave the group; without it gloo now and then aborts at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()
