"""`headway distill cache`: a teacher runs once over the samples of a run, and what students need of it is kept."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from headway.launch.accelerate.job import resolve_asked
from headway.launch.assemble import choose_hardware, join, settled
from headway.launch.console import console
from headway.launch.environment import Ranks, find_ranks
from headway.launch.signals import StopRequest
from headway.launch.teacher import blank, find_teacher, shape_of
from headway.launch.teacher_cache import TEACHER, identity_of, identity_of_teacher
from headway.parallel import mesh
from headway.parallel.distill.hire import DTYPES, spread_beside
from headway.parallel.distill.record import Shelves, everything, fields_of
from headway.parallel.engines import capabilities
from headway.parallel.mesh import Layout, World, rows_per_micro_batch
from headway.pretrain import device as devices
from headway.pretrain.data.dataset import open_dataset
from headway.pretrain.data.loader import Loader
from headway.pretrain.data.ramp import BatchSizes
from headway.pretrain.data.stream import SampleStream
from headway.pretrain.data.teacher_cache import CacheWriter
from headway.pretrain.engine import Batch
from headway.pretrain.errors import Interrupted, JobError
from headway.pretrain.inert import refuse_inert
from headway.pretrain.objectives import build_objective
from headway.pretrain.recipe import Resolved

STORED = ("auto", "bf16", "fp32", "fp64")


def check(recipes: Sequence[str], sets: Sequence[str], out: str, dtype: str, ranks: int) -> Resolved:
    """The job of a cache; raises JobError if none can be made of it on so many ranks."""
    sets = [*sets, "objective.distill.cache=null"]
    resolved, _ = resolve_asked(recipes, sets, None, Ranks(world=ranks, local_world=ranks))
    refuse_inert(resolved)
    job, settings = resolved.job, resolved.job.objective.distill
    if dtype not in STORED:
        raise JobError("--dtype", dtype, f"is one of {', '.join(STORED)}", "auto")
    if settings.teacher is None:
        rule = "a cache holds what a teacher gives: name one"
        raise JobError(TEACHER, None, rule, "a run, a checkpoint, or a folder of Hugging Face")
    if not settings.terms:
        rule = "no part of the loss has a weight, so there is nothing to keep of the teacher"
        raise JobError("objective.distill.logits.weight", settings.logits.weight, rule, 1.0)
    if Path(out).exists():
        raise JobError("--out", out, "exists already: delete it to make the cache again, or name another")
    if apart := job.parallel.teacher.ranks:
        rule = "the teacher of a cache computes on the ranks that write it"
        raise JobError("parallel.teacher.ranks", apart, rule, 0)
    layout = mesh.lay_out(job.parallel, ranks)
    check_rows(layout)
    capabilities.check(job, layout, devices.choose_device(job.parallel.device).type)
    rows_per_micro_batch(job, layout.data)
    return resolved


def check_rows(layout: Layout) -> None:
    """Raise JobError if ranks would have parts of rows."""
    for axis in ("pipeline", "context", "tensor"):
        if (size := getattr(layout, axis)) != 1:
            rule = (
                f"ranks that write a cache have whole rows; the teacher's layout is parallel.teacher.{axis}"
            )
            rule = rule if axis != "pipeline" else "ranks that write a cache have whole rows"
            raise JobError(f"parallel.{axis}", size, f"{rule}. Any layout reads the cache", 1)


def cache(recipes: Sequence[str], sets: Sequence[str], out: str, dtype: str = "auto") -> None:
    """Keep what a job's teacher gives for the samples that its steps draw; goes on where it was interrupted.

    Args:
        recipes, sets: of the job.
        out: the folder of the cache, which does not exist yet.
        dtype: of features; that of the teacher if "auto". See `fields_of`.

    Raises:
        JobError: the job is wrong.
        DataError: data is missing, or the disk is full.
        Interrupted: asked to stop; what was computed is kept.
    """
    ranks = find_ranks().world
    resolved = check(recipes, sets, out, dtype, ranks)
    with ExitStack() as stack:
        world = join(resolved.job)
        stack.callback(mesh.stop)
        stack.enter_context(world.named(lambda: "writing the cache"))
        maker = Maker(resolved, world, Path(out), dtype)
        stack.callback(maker.loader.close)
        maker.make(stack.enter_context(StopRequest()))


class Maker:
    """A cache in the making, on one rank."""

    def __init__(self, resolved: Resolved, world: World, out: Path, dtype: str) -> None:
        hardware = choose_hardware(resolved.job, world)
        self.job = job = settled(resolved, hardware).job
        self.world, self.out = world, out
        dataset = open_dataset(job, progress=world.main)
        source = find_teacher(job, dataset)
        assert source is not None
        shape = shape_of(source)
        told = dataset.specials, dataset.starts
        self.objective = build_objective(job, dataset.inputs, *told, device="meta", teacher=shape)
        distillation = self.objective.distillation
        assert distillation is not None
        self.wanted = everything(distillation)
        theirs, model, fill = blank(source, job, dataset, hardware.precision)
        self.dtype = DTYPES[theirs.precision if dtype == "auto" else dtype]
        shelves = Shelves(job, theirs.model, world.layout, distillation, None)
        self.teacher = spread_beside(shelves, world, theirs, model, fill)
        self.identity = identity_of(job, dataset, self.objective)
        self.identity |= identity_of_teacher(source, shape, job, theirs.precision)
        self.sizes = BatchSizes(job.train)
        self.rows = rows_per_micro_batch(job, world.layout.data)
        place = world.data_rank, world.layout.data
        stream = SampleStream(dataset.train, job.train.seed)
        pin = world.device.type == "cuda"
        self.loader = Loader(stream, self.objective.collate, self.sizes, *place, pin=pin)

    def make(self, stop: StopRequest) -> None:
        """Write what is missing, and publish. Collective."""
        fields = fields_of(self.give(self.micros(self.first_batch())[0]), self.dtype)
        writer = CacheWriter.resume(self.out, self.identity, fields, part=self.world.rank)
        self.world.barrier()  # all know the same rows before one adds some
        with writer:
            begun = self.begin(writer)
            self.tell(begun, 8 + sum(field.nbytes for field in fields.values()))
            for step in range(begun, self.job.train.steps):
                for micro in self.micros(next(self.loader)):
                    self.write(writer, micro)
                if self.world.any(stop.asked):
                    writer.close()
                    rule = f"asked to stop: kept step {step + 1} of {self.job.train.steps}"
                    raise Interrupted(f"{rule}; start again to go on")
        self.world.barrier()
        if self.world.main:
            writer.publish(self.world.size)
            console().print(f"{self.out} is complete")
        self.world.barrier()

    def begin(self, writer: CacheWriter) -> int:
        """The first step that lacks a row; all are kept in order but for what a kill has lost. Moves the loader."""
        stream, step = self.loader.stream, 0
        while step < self.job.train.steps:
            draws = np.arange(self.sizes.first(step), self.sizes.first(step + 1))
            if not writer.has(stream.keys(draws)).all():
                break
            step += 1
        stream.draw = self.sizes.first(step)
        return step

    def write(self, writer: CacheWriter, micro: Batch) -> None:
        """Add the rows of a micro-batch that are not there."""
        found, missing = self.give(micro), ~writer.has(micro["key"])
        if missing.any():
            here = missing.to(self.world.device)
            writer.add(micro["key"][here], {name: x[here] for name, x in found.items()})

    def give(self, micro: Batch) -> Batch:
        """What the teacher gives for this rank's rows. Collective."""
        return self.teacher.give(micro, self.wanted)

    def first_batch(self) -> Batch:
        """This rank's rows of the first step."""
        stream, place = self.loader.stream, (self.loader.rank, self.loader.ranks)
        rows = stream.batch(0, self.sizes.rows(0), *place)
        return self.objective.collate(rows) | {name: torch.from_numpy(rows[name]) for name in ("slot", "key")}

    def micros(self, batch: Batch) -> list[Batch]:
        """A batch as training cuts it, on the device: so the teacher computes the same bits as beside a run."""
        count, device = len(batch["slot"]), self.world.device
        there = {name: x.to(device, non_blocking=True) for name, x in batch.items()}
        return [{n: x[i : i + self.rows] for n, x in there.items()} for i in range(0, count, self.rows)]

    def tell(self, begun: int, row: int) -> None:
        """Say what will be written."""
        samples = self.sizes.first(self.job.train.steps)
        if self.world.main:
            there = f", {self.sizes.first(begun):,} of them are there" if begun else ""
            size = f"{samples * row / 2**20:,.1f} MiB, {row / 2**10:,.1f} KiB a sample"
            console().print(f"{self.out}: {samples:,} samples{there}; {size}")
