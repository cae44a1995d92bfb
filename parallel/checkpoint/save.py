"""Saving: every rank copies what it owns to host memory, and a thread writes, checks and publishes it."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from headway.parallel.checkpoint import parts
from headway.parallel.checkpoint.durable import disk_errors, remove_tree
from headway.parallel.checkpoint.host import HostBuffer
from headway.parallel.checkpoint.layout import held
from headway.parallel.checkpoint.manifest import check_json
from headway.parallel.checkpoint.owner import Start
from headway.parallel.checkpoint.plan import Plan, make_plan
from headway.parallel.checkpoint.publish import Folder, new_token
from headway.parallel.checkpoint.retention import latest, retire
from headway.parallel.checkpoint.team import Team
from headway.pretrain.engine import State
from headway.pretrain.errors import CheckpointError, FencedError
from headway.pretrain.tensor_files import bytes_of, header, write_shard


class Work(NamedTuple):
    """One rank's part of one save."""

    step: int
    staging: Path
    plan: Plan
    views: list[Tensor]
    numbers: dict[str, Any]
    job: dict[str, Any]


class Checkpointer:
    """Saves states into a run's `checkpoints/` folder. One at a time; construct it on all ranks together.

    A failed save (disk full, a rank that does not answer) does not raise: it is put on `problems` for the
    caller to show, its files are removed, the last good checkpoint stays, and the next save tries again.
    A process that ends without `close` still finishes what it is writing.

    Args:
        folder: `runs/NAME/checkpoints`, on a file system that all ranks share.
        group: the ranks that hold the state; the default process group, or this process alone, if not given.
        background: write in a thread; `save` then returns when the copy to host memory is complete.
        keep_last: newest checkpoints that are kept.
        keep_every: checkpoints at multiples of this many steps are kept for good; 0 keeps none for good.
        start: which start of the job this is; fences off a predecessor that is still writing.
        timeout: seconds that rank 0 waits for another rank's shard after the last one that came.

    Attributes:
        problems: faults since the caller last looked (pop them); on rank 0 those of all ranks.
        published: folders that were published, in order; rank 0 only.

    Raises:
        CheckpointError: the folder cannot be made or written, or a later start of the same job owns it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        group: dist.ProcessGroup | None = None,
        background: bool = True,
        keep_last: int = 2,
        keep_every: int = 0,
        start: Start = Start(),
        timeout: float = 300.0,
    ) -> None:
        self.team = Team(group)
        self.background, self.keep_last, self.keep_every = background, max(1, keep_last), keep_every
        self.timeout = timeout
        self.problems: list[CheckpointError] = []
        self.published: list[Path] = []
        token = int(self.team.gather([new_token()])[0, 0])
        self.folder = Folder(Path(folder), token, start)
        self._attempt = 0
        self._good = False  # this rank's share of the last save; on rank 0: it is published
        self._plan: Plan | None = None
        self._buffer = HostBuffer()
        self._writer: threading.Thread | None = None
        self._copied = threading.Event()
        self._copied.set()
        with self.team.together():
            if self.team.rank == 0:
                with disk_errors(self.folder.path, "be made ready for checkpoints"):
                    self.folder.take_over()

    def save(
        self, step: int, state: State, job: Mapping[str, Any] | None = None, *, deferred: bool = False
    ) -> None:
        """Save `state` as the checkpoint of `step`; collective.

        Numbers and job are taken from rank 0 and are JSON values (`job.model_dump(mode="json")`).

        Returns when the values have been copied (background), so that training may change them, or when the
        checkpoint is published. Waits for an earlier save that is still being written.

        Args:
            deferred: return at once and copy while the next forward and backward run, which read the values;
                `copied` must then be called before anything changes them. Tensors of a GPU are copied at once.

        Raises:
            CheckpointError: the state cannot be saved at all: a dtype or placement that a checkpoint cannot
                hold, numbers that are not JSON, ranks at different steps. Faults of the disk do not raise.
        """
        self._join()
        self._attempt += 1
        self._good = False
        numbers, job = dict(state.numbers), dict(job or {})
        with self.team.together():
            check_json(numbers, "numbers")
            check_json(job, "job")
            have = held(state.tensors)
        opened = self._open_staging(step)
        changed = self._plan is None or not self._plan.fits(have)
        said = self.team.gather([step, opened, changed])
        if said[:, 0].min() != said[:, 0].max():
            raise CheckpointError(f"ranks save different steps: {said[:, 0].tolist()}.")
        if not said[0, 1]:
            return  # rank 0 has put the reason on its problems
        if self._plan is None or said[:, 2].any():
            self._plan = make_plan(state, have, self.team)
        plan, staging = self._plan, self.folder.staging(step, self._attempt)
        views = [have[index].view for index in plan.chosen]
        # The caller may change its dicts while the thread writes.
        work = Work(step, staging, plan, views, copy.deepcopy(numbers), copy.deepcopy(job))
        if self.background and deferred and not any(view.is_cuda for view in views):
            self._copied.clear()
            self._start(self._copy_and_write, work)
        elif not self.background:  # nothing changes meanwhile: there is no need of a copy of everything
            self._write(work, map(bytes_of, views))
        elif (data := self._copy(work)) is not None:
            self._start(self._write, work, (data,))

    def copied(self) -> None:
        """Return when the last save no longer needs the state's tensors: before they change."""
        self._copied.wait()

    def wait(self) -> bool:
        """Wait for the last save; collective. True on all ranks if its checkpoint has been published."""
        self._join()
        return bool(self.team.gather([self._good])[0, 0])

    def fenced(self) -> FencedError | None:
        """Why this run must end, if another start of it has taken over the folder; asked on rank 0."""
        return self.folder.owner.successor()

    def close(self) -> None:
        """Finish what this rank is writing and free the buffers; `problems` can still be read."""
        self._join()
        self._buffer.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _join(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _open_staging(self, step: int) -> bool:
        if self.team.rank == 0:
            try:
                with disk_errors(self.folder.path, f"take a checkpoint of step {step}"):
                    self.folder.open_staging(step, self._attempt)
            except CheckpointError as error:
                self._report(step, error)
                return False
        return True

    def _start(self, target: Callable[..., None], work: Work, *more: Iterable[memoryview]) -> None:
        name = f"checkpoint-{work.step}"
        self._writer = threading.Thread(target=target, args=(work, *more), name=name)
        self._writer.start()

    def _copy(self, work: Work) -> memoryview | None:
        """Copy this rank's pieces to host memory; None, and the fault reported, if there is not enough."""
        plan = work.plan
        try:
            return self._buffer.fill(work.views, [slot.start for slot in plan.slots], plan.nbytes)
        except (RuntimeError, MemoryError) as error:
            self._give_up(work.step, work.staging, error)
            return None

    def _copy_and_write(self, work: Work) -> None:
        try:
            data = self._copy(work)
        finally:
            self._copied.set()
        if data is not None:
            self._write(work, (data,))

    def _write(self, work: Work, data: Iterable[memoryview]) -> None:
        """Write this rank's shard and tell rank 0; rank 0 waits for all and publishes. No collective here."""
        step, staging, plan = work.step, work.staging, work.plan
        try:
            with disk_errors(staging, "be written", needed=plan.nbytes):
                parts.tell(staging, self.team.rank, self._write_shard(staging, plan, data))
            if self.team.rank == 0:
                with disk_errors(staging, f"be published as the checkpoint of step {step}"):
                    said = parts.collect(staging, self.team.world, self.timeout)
                    manifest = parts.merge(said, step, work.numbers, work.job, staging)
                    self.published.append(self.folder.publish(staging, manifest))
        except Exception as error:
            # Nothing that goes wrong in this thread may end the training, or go unseen.
            self._give_up(step, staging, error)
        else:
            self._good = True
            self._retire(step)

    def _write_shard(self, staging: Path, plan: Plan, data: Iterable[memoryview]) -> dict[str, Any]:
        if not plan.slots:
            return {"file": None, "tensors": plan.tensors}
        name = parts.shard_name(self.team.rank)
        size, digest = write_shard(staging / name, header(plan.slots), data)
        return {"file": name, "bytes": size, "sha256": digest, "tensors": plan.tensors}

    def _give_up(self, step: int, staging: Path, error: Exception) -> None:
        """Remove what this attempt wrote, say why, and let rank 0 know at once, not after a timeout."""
        self._report(step, error)
        if self.team.rank == 0:
            remove_tree(staging)
            return
        with contextlib.suppress(OSError):
            (staging / parts.shard_name(self.team.rank)).unlink(missing_ok=True)
            parts.tell(staging, self.team.rank, {"error": str(error)})

    def _retire(self, step: int) -> None:
        if self.team.rank != 0:
            return
        try:
            with disk_errors(self.folder.path, "let an old checkpoint go"):
                retire(self.folder.path, step, self.keep_last, self.keep_every)
        except CheckpointError as error:
            self.problems.append(error)

    def _report(self, step: int, error: Exception) -> None:
        last = latest(self.folder.path)
        stays = f"The last good checkpoint is {last}." if last else "There is no earlier checkpoint."
        problem = CheckpointError(f"step {step} was not saved: {error} {stays} The next save tries again.")
        problem.__cause__ = error
        self.problems.append(problem)
