"""The commands that need a whole run: train, eval, look."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from headway.launch import saving
from headway.launch.accelerate.job import find_asked_ranks, resolve_asked
from headway.launch.accelerate.job import tell as tell_asked
from headway.launch.assemble import Parts, assemble, choose_hardware, join, run_folder
from headway.launch.energy import RunEnergy
from headway.launch.environment import Ranks, this_start
from headway.launch.facts import data, facts
from headway.launch.finish import Finished, finish, heldout_values, report
from headway.launch.ledger import open_ledger
from headway.launch.place import find_place
from headway.launch.resume import check_resumable, keep_choices, set_aside
from headway.launch.samples import show_samples
from headway.launch.signals import StopRequest
from headway.launch.teacher import begin_with, teach
from headway.parallel import mesh
from headway.parallel.checkpoint.save import Checkpointer
from headway.parallel.distill.apart import FarTeacher
from headway.parallel.engines import capabilities
from headway.parallel.engines.build import check_installed
from headway.parallel.mesh import World
from headway.pretrain import device as devices
from headway.pretrain.config import Job
from headway.pretrain.errors import FencedError, HeadwayError, Interrupted, JobError
from headway.pretrain.files import publish
from headway.pretrain.inert import inert, refuse_inert
from headway.pretrain.recipe import Resolved, dump, load_job, resolve
from headway.pretrain.records.backends import check_backends
from headway.pretrain.records.metrics import peak_memory_gib
from headway.pretrain.records.records import Recorder, open_records
from headway.pretrain.trainer import Agreement, Trainer


def check(
    recipes: Sequence[str],
    sets: Sequence[str],
    ranks: int | Ranks,
    device: str | None = None,
    accelerate: str | None = None,
) -> None:
    """Refuse a job that cannot run on so many ranks, before any is started; raises JobError.

    Args:
        ranks: how many, of one host; or as the first will find itself.
        device: kind of device where it will run, `cuda` or `cpu`; this machine's if not given.
        accelerate: config file of Accelerate.
    """
    ranks = Ranks(world=ranks, local_world=ranks) if isinstance(ranks, int) else ranks
    resolved, _ = resolve_asked(recipes, sets, accelerate, ranks)
    refuse_inert(resolved)
    check_backends(resolved.job.tracking)
    layout = mesh.lay_out(resolved.job.parallel, mesh.students(resolved.job, ranks.world))
    device = device or devices.choose_device(resolved.job.parallel.device).type
    capabilities.check(resolved.job, layout, device)
    check_installed(resolved.job.parallel.engine)
    mesh.rows_per_micro_batch(resolved.job, layout.data)
    compare_with_saved(run_folder(resolved.job), resolved)


def train(
    recipes: Sequence[str],
    sets: Sequence[str],
    *,
    fresh: bool = False,
    stop: StopRequest | None = None,
    accelerate: str | None = None,
) -> None:
    """Train a job, or go on with it where its run folder stands. `stop` notes a request to stop, also one that comes
    when all is trained and is no longer heeded here; `accelerate` names a config file of Accelerate."""
    resolved, asked = resolve_asked(recipes, sets, accelerate, find_asked_ranks(accelerate))
    refuse_inert(resolved)
    check_backends(resolved.job.tracking)
    folder = run_folder(resolved.job)
    with ExitStack() as stack:
        world = join(resolved.job)
        stack.push(partial(leave, world))
        stack.enter_context(world.named(lambda: "beside the steps (start, evaluation, report)"))
        if fresh and world.main and (aside := set_aside(folder)):
            print(f"{folder} was set aside as {aside}")
        world.meet()
        resolved, notes = compare_with_saved(folder, resolved)
        world.meet()
        if world.teaches:
            return be_teacher(resolved.job, world, stack.enter_context(stop or StopRequest()))
        parts = assemble(resolved, world)
        stack.callback(parts.loader.close)
        if isinstance(parts.engine.teacher, FarTeacher):
            stack.callback(parts.engine.teacher.close)
        if world.main:
            tell(parts, [*tell_asked(asked), *notes])
        # From here on there is state to save; before, an interrupt simply ends the process.
        run(parts, folder, stack.enter_context(stop or StopRequest()))


def leave(world: World, kind: type[BaseException] | None, *_: object) -> None:
    """End together, unless something failed: launchers end all ranks when the first one ends with a code, and rank 0
    may still be publishing what all have saved."""
    if kind is None or issubclass(kind, Interrupted):
        world.meet()
    mesh.stop()


def be_teacher(job: Job, world: World, stop: StopRequest) -> None:
    """What a rank does that is the teacher's alone."""
    teach(job, world, choose_hardware(job, world).precision)
    if stop.asked:
        raise Interrupted("asked to stop, as the student was")


def compare_with_saved(folder: Path, resolved: Resolved) -> tuple[Resolved, list[str]]:
    """The job with what `auto` meant when the run was begun, and what differs from then.

    Raises:
        JobError: a difference with which the run cannot go on.
    """
    path = folder / "job.yaml"
    if not path.exists():
        return resolved, []
    saved = load_job(path)
    resolved = keep_choices(saved, resolved)
    changed = check_resumable(saved.job, resolved.job)
    return resolved, [f"changed since the run began: {line}" for line in changed]


def tell(parts: Parts, notes: Sequence[str]) -> None:
    """Say what was chosen, and save the resolved job with the run."""
    folder = run_folder(parts.job)
    folder.mkdir(parents=True, exist_ok=True)
    publish(folder / "job.yaml", dump(parts.resolved))
    useless = [f"{field} has no effect: {why}" for field, why in inert(parts.resolved).items()]
    for line in [f"run {folder}", *parts.hardware.notes, *parts.dataset.notes, *notes, *useless]:
        print(f"  {line}")


def run(parts: Parts, folder: Path, stop: StopRequest) -> None:
    """Take over the folder, restore, train, evaluate, report."""
    with open_checkpoints(parts, folder) as checkpointer:  # before one is chosen: none is published meanwhile
        go_on(parts, folder, stop, checkpointer)


def go_on(parts: Parts, folder: Path, stop: StopRequest, checkpointer: Checkpointer) -> None:
    """Restore, train, evaluate, report."""
    job, world = parts.job, parts.world
    path, warnings = saving.choose(folder / "checkpoints", world)
    done = 0
    if path:
        done, changes = saving.restore(parts, path)
        warnings += changes
        if world.main:
            print(f"  goes on from {path}")
    elif job.train.start_from:
        saving.weights_only(parts, job.train.start_from)
    elif job.objective.distill.init is not None and parts.teacher:
        begin_with(parts.teacher, job, saving.weights_of(parts.engine))
        parts.engine.weights_changed()
    elif job.model.init.lsuv:
        parts.engine.scale_weights(parts.first_batch())
    if path and done >= job.train.steps and (folder / "report.html").exists():
        if world.main:
            Finished.read(folder).show(f"{folder} is complete at step {done}")
        return
    where, told, energy = find_place(parts, path), facts(parts), RunEnergy(job, world)
    recorder = open_records(folder, job, start_step=done, rank=world.rank, place=where, facts=told)
    recorder.event("data", **data(parts.dataset))
    energy.tell(recorder)
    for warning in warnings:
        recorder.event("warning", message=warning)
    status = "failed"
    try:
        train_and_save(parts, folder, recorder, stop, checkpointer, energy, done)
        agree(
            world, stop, checkpointer, energy
        )  # too late to stop, but not to leave the report to a successor
        finished = finish(parts, folder, recorder, energy)
        status = "done"
    except Interrupted:
        status = "stopped"
        energy.end()
        raise
    except FencedError:
        status = "fenced"
        raise
    except Exception as error:
        recorder.event("failure", error=type(error).__name__, message=str(error))
        raise
    finally:
        energy.close()
        recorder.close(status, finished.summary if status == "done" else None)
    if world.main:
        finished.show(f"{folder} is complete at step {job.train.steps}")


def open_checkpoints(parts: Parts, folder: Path) -> Checkpointer:
    """Become the owner of a run's folder; collective."""
    job = parts.job
    return Checkpointer(
        folder / "checkpoints",
        background=job.checkpoint.background,
        keep_last=job.checkpoint.keep_last,
        keep_every=job.checkpoint.keep_every,
        start=this_start(),
        group=parts.world.everyone,
        timeout=job.parallel.timeout / 2,  # the others wait for rank 0 in a collective meanwhile
    )


def agree(world: World, stop: StopRequest, checkpointer: Checkpointer, energy: RunEnergy) -> Agreement:
    """Whether any rank was asked to stop, and what all used since: one all-reduce.

    Raises:
        FencedError: another start of this run has taken over its folder, on all ranks.
    """
    fenced = checkpointer.fenced() if world.main else None
    mine = float(stop.asked), float(fenced is not None), energy.take()
    stops, fences, joules = world.sum(*mine, along=mesh.AXES)
    if fences:
        raise fenced or FencedError("rank 0 found that another start of this run owns its folder")
    return Agreement(stops > 0, energy.of_all(joules))


def train_and_save(
    parts: Parts,
    folder: Path,
    recorder: Recorder,
    stop: StopRequest,
    checkpointer: Checkpointer,
    energy: RunEnergy,
    done: int,
) -> None:
    """The training loop with its checkpoints; state is saved before an interruption is passed on."""
    job, world = parts.job, parts.world
    saver = saving.Saver(checkpointer, parts, recorder)
    trainer = Trainer(
        job=job,
        engine=parts.engine,
        batches=parts.batches(),
        recorder=recorder,
        yardstick=parts.yardstick,
        saver=saver,
        evaluate=partial(heldout_values, parts),
        agree=partial(agree, world, stop, checkpointer, energy),
        name_samples=parts.name_samples,
        memory=partial(peak_memory_gib, world.device),
        ledger=open_ledger(parts, folder, recorder, done),
        show_samples=partial(show_samples, parts, recorder),
    )
    try:
        with world.named(lambda: f"step {trainer.step}"):
            trainer.run(done)
    finally:
        saver.close()
        if trainer.ledger:
            trainer.ledger.close()


def evaluate(run_path: str, sets: Sequence[str]) -> None:
    """Print the held-out loss and bits per byte of a run's newest checkpoint."""
    with ExitStack() as stack:
        parts = restored(run_path, sets, stack)
        values = heldout_values(parts, None)
        if parts.world.main:
            print("  ".join(f"{name} {value:.4f}" for name, value in values.items()))


def look(run_path: str) -> None:
    """Rebuild a run's report."""
    with ExitStack() as stack:
        parts = restored(run_path, [], stack)
        if parts.world.main:
            print(report(parts, Path(run_path)))


def restored(run_path: str, sets: Sequence[str], stack: ExitStack) -> Parts:
    """A saved run, put together again with its newest whole checkpoint.

    Raises:
        JobError: no run there.
    """
    saved = Path(run_path) / "job.yaml"
    if not saved.exists():
        raise JobError("run", run_path, "is no run folder: it has no job.yaml", "e.g. runs/gpt-tiny")
    resolved = resolve([str(saved)], [*sets, "train.compile=false"])
    world = join(resolved.job)
    stack.callback(mesh.stop)
    parts = assemble(Resolved(resolved.job, load_job(saved).origins), world)
    stack.callback(parts.loader.close)
    path, _ = saving.choose(Path(run_path) / "checkpoints", world)
    if path is None:
        raise HeadwayError(f"{run_path} has no checkpoint yet")
    saving.restore(parts, path)
    return parts
