"""Where all rooms meet: from a resolved job to the parts of a run, each after what it needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from headway.kernels import fused
from headway.kernels.attention.choose import choose
from headway.launch.environment import find_ranks
from headway.launch.master import set_master
from headway.launch.signals import end_with_launcher
from headway.launch.teacher import find_teacher, give_head, hire, shape_of
from headway.launch.teacher_cache import check_cache, open_cache, read_beside, shape_in
from headway.launch.teacher_source import TeacherSource
from headway.parallel import mesh
from headway.parallel.engines import capabilities
from headway.parallel.engines.base import BaseEngine
from headway.parallel.engines.build import build_engine, check_installed
from headway.parallel.mesh import Layout, World, rows_per_micro_batch
from headway.parallel.pipeline.rules import micro_rows, splits_backward
from headway.pretrain import device as devices
from headway.pretrain.config import Job
from headway.pretrain.data.dataset import Dataset, open_dataset
from headway.pretrain.data.loader import Loader
from headway.pretrain.data.ramp import BatchSizes
from headway.pretrain.data.stream import SampleStream
from headway.pretrain.engine import Batch
from headway.pretrain.errors import JobError
from headway.pretrain.evaluate import Evaluator
from headway.pretrain.models.sizes import training_flops
from headway.pretrain.objectives import build_objective
from headway.pretrain.recipe import Resolved
from headway.pretrain.trainer import Yardstick


@dataclass
class Hardware:
    """Where the run computes, how exactly, and how fast that could be."""

    world: World
    precision: str
    precision_reason: str
    compiled: bool
    compile_reason: str
    peak: float
    peak_source: str
    notes: list[str]


@dataclass
class Parts:
    """A run, put together."""

    resolved: Resolved
    hardware: Hardware
    dataset: Dataset
    loader: Loader
    engine: BaseEngine
    evaluator: Evaluator
    yardstick: Yardstick
    teacher: TeacherSource | None = None

    def batches(self) -> Iterator[Batch]:
        """This rank's rows of successive global batches, on the device."""
        device = self.world.device
        for batch in self.loader:
            yield {key: value.to(device, non_blocking=True) for key, value in batch.items()}

    def first_batch(self) -> Batch:
        """This rank's rows of the first global batch, without taking it from the order."""
        sizes, layout = self.loader.sizes, self.world.layout
        rows = self.loader.stream.batch(0, sizes.rows(0), self.world.data_rank, layout.data)
        batch = self.engine.objective.collate(rows)
        return {key: value.to(self.world.device) for key, value in batch.items()}

    def name_samples(self) -> str:
        """Names of all samples of the last global batch, for error messages."""
        return "; ".join(self.loader.stream.describe(draw) for draw in self.loader.draws)

    @property
    def folder(self) -> Path:
        return run_folder(self.job)

    @property
    def job(self) -> Job:
        return self.resolved.job

    @property
    def world(self) -> World:
        return self.hardware.world


def run_folder(job: Job) -> Path:
    return Path(job.run.dir) / job.run.name


def join(job: Job) -> World:
    """Find the ranks, lay them out, check what the engine can do, and join them."""
    ranks = find_ranks()
    end_with_launcher(ranks)
    layout = mesh.lay_out(job.parallel, mesh.students(job, ranks.world))
    device = devices.choose_device(job.parallel.device, ranks.local_rank)
    capabilities.check(job, layout, device.type)
    check_installed(job.parallel.engine)
    rows_per_micro_batch(job, layout.data)
    backend = devices.choose_backend(device, job.parallel.backend)
    set_master(ranks)
    return mesh.start(job, layout, ranks.rank, ranks.world, ranks.local_rank, device, backend)


def assemble(resolved: Resolved, world: World) -> Parts:
    """Data, model, engine and evaluator of a job."""
    job = resolved.job
    hardware = choose_hardware(job, world)
    resolved = settled(resolved, hardware)
    job = resolved.job
    dataset = open_dataset(job, progress=world.main)
    inputs = dataset.inputs
    source = find_teacher(job, dataset)
    cache = open_cache(job, source)
    shape = shape_of(source) if source else shape_in(cache) if cache else None
    told = dataset.specials, dataset.starts
    objective = build_objective(job, inputs, *told, device="meta", teacher=shape)
    if cache is not None:
        check_cache(cache, job, dataset, objective)
    loader = Loader(
        SampleStream(dataset.train, job.train.seed),
        objective.collate,
        BatchSizes(job.train),
        world.data_rank,
        world.layout.data,
        pin=world.device.type == "cuda",
    )
    engine = build_engine(job, objective, world, precision=hardware.precision, compiled=hardware.compiled)
    if cache is not None:
        engine.teacher = read_beside(cache, engine)
        if source is not None:
            give_head(source, engine)
    elif source is not None:
        engine.teacher = hire(source, job, engine, dataset, hardware.precision)
    evaluator = Evaluator(
        engine, dataset.heldout, objective.collate, world.device, world.data_rank, world.layout.data
    )
    yardstick = Yardstick(training_flops(job, inputs), hardware.peak * world.size)
    return Parts(resolved, hardware, dataset, loader, engine, evaluator, yardstick, source)


def settled(resolved: Resolved, hardware: Hardware) -> Resolved:
    """The job with `auto` replaced by what was chosen, and the reason as its origin."""
    if resolved.job.precision == "auto":
        resolved = resolved.settle("precision", hardware.precision, f"auto: {hardware.precision_reason}")
    if resolved.job.train.compile == "auto":
        resolved = resolved.settle("train.compile", hardware.compiled, f"auto: {hardware.compile_reason}")
    return resolved


LONG_ENOUGH_TO_COMPILE = 100
"""Steps from which `train.compile: auto` compiles: compilation takes seconds to a minute."""


def choose_hardware(job: Job, world: World) -> Hardware:
    """Precision, kernels and compilation, chosen on the first rank for all, with what people should know."""
    rows = micro_rows(job, world.layout) * job.row_tokens
    names = list(devices.PRECISIONS)
    precision, reason = str(job.precision), "set in the job"
    if world.main or job.precision != "auto":
        precision, reason = devices.choose_precision(
            job.precision, world.device, hidden=job.model.hidden, rows=rows, ffn=job.model.ffn_width
        )
    if job.precision == "auto":
        precision = names[int(world.sum(names.index(precision) if world.main else 0, along=mesh.AXES)[0])]
    computing = choose_kernels(job, world.device, precision)
    compiled, why = choose_compile(job, world.device, world.layout)
    peak, source = devices.peak_rate(world.device, devices.PRECISIONS[precision])
    notes = [
        f"device {world.device} ({devices.device_name(world.device)}), {world.size} rank(s), {world.layout}"
        + (f", collectives over {world.backend}" if world.size > 1 else ""),
        f"precision {precision}: {reason}",
        *(
            f"attention {word}, kernel {attention_kernel(job, word, world.device, precision, compiled)}"
            for word in job.model.attention.mechanisms
        ),
        *computing,
        f"compile {'on' if compiled else 'off'}: {why}",
        f"peak {peak / 1e9:,.0f} GFLOP/s a device: {source}",
    ]
    return Hardware(world, precision, reason, compiled, why, peak, source, notes)


def attention_kernel(job: Job, word: str, device: torch.device, precision: str, compiled: bool) -> str:
    """Name of the kernel that will compute a mechanism here."""
    attention = job.model.attention
    return choose(
        word,
        attention.kernel,
        dropout=attention.dropout > 0,
        bias=job.model.biased,
        device=device.type,
        dtype=devices.PRECISIONS[precision],
        compiled=compiled,
        described=job.model.positions == "alibi",
        causal=job.model.family == "gpt",
        width=job.model.head_width,
    ).name


def choose_kernels(job: Job, device: torch.device, precision: str) -> list[str]:
    """Let this process compute by the kernels that the job wants; raises JobError where they cannot run.

    Returns: where there was a choice, what people should know of it.
    """
    wanted = job.train.kernels
    if wanted == "triton":
        rule = fused.unavailable(device.type)
        if precision == "fp64":
            rule = "Triton's kernels take fp32, bf16 and fp16, not precision fp64"
        if job.train.compile is True:
            rule = "compiled blocks are fused by PyTorch's compiler: train.compile must be false"
        if rule:
            raise JobError("train.kernels", wanted, rule, "auto")
    fused.prefer(wanted)
    if wanted == "auto" and device.type != "cuda":
        return []
    if wanted != "auto":
        return [f"kernels {wanted}: set in the job"]
    missing = fused.unavailable(device.type)
    return [f"kernels torch: {missing}" if missing else "kernels triton, where blocks are not compiled: auto"]


def choose_compile(job: Job, device: torch.device, layout: Layout) -> tuple[bool, str]:
    """Whether to compile, and why; raises JobError if it was asked for and cannot be.

    `auto` compiles where curves of compiled blocks were held to eager ones: along one axis of the model.
    """
    asked = job.train.compile
    possible = device.type != "cpu" or devices.compiler_available()
    if asked is True and not possible:
        rule = "torch.compile needs a C++ compiler and Python's headers here (apt install g++ python3-dev)"
        raise JobError("train.compile", True, rule, False)
    if asked != "auto":
        return bool(asked), "set in the job"
    if job.train.kernels == "triton":
        return False, "train.kernels triton computes what compiled blocks fuse by themselves"
    if job.parallel.engine != "native":
        return False, f"the {job.parallel.engine} engine does not compile"
    if splits_backward(job, layout):
        why = f"parallel.schedule {job.parallel.schedule} splits the backward, compiled blocks have one"
        return False, why
    if sum(size > 1 for size in (layout.pipeline, layout.context, layout.tensor, layout.expert)) > 1:
        return False, "compiled blocks are tested along one axis of the model at a time"
    if not possible:
        return False, "no C++ compiler with Python's headers on this machine"
    if job.train.steps < LONG_ENOUGH_TO_COMPILE:
        return False, f"fewer than {LONG_ENOUGH_TO_COMPILE} steps"
    return True, "a compiler is here and the run is long"
