"""Between a run and its checkpoints: what goes in, what is told, and from where a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from headway.launch.assemble import Parts
from headway.launch.start_from import from_checkpoint, is_weight, start_from
from headway.parallel.checkpoint.load import load
from headway.parallel.checkpoint.manifest import read_manifest
from headway.parallel.checkpoint.retention import folder_name, list_checkpoints, step_of
from headway.parallel.checkpoint.save import Checkpointer
from headway.parallel.checkpoint.verify import newest_good
from headway.parallel.engines.base import BaseEngine
from headway.parallel.mesh import AXES, World
from headway.pretrain.engine import State
from headway.pretrain.errors import CheckpointError, FencedError
from headway.pretrain.records.records import Recorder


class Saver:
    """Writes checkpoints of a run and tells the recorder what became of them."""

    def __init__(self, checkpointer: Checkpointer, parts: Parts, recorder: Recorder) -> None:
        self.checkpointer, self.parts, self.recorder = checkpointer, parts, recorder
        self._told = 0
        parts.engine.before_update = checkpointer.copied  # the copy is deferred until the next update

    def save(self, step: int) -> None:
        """Save the state after `step` steps."""
        state = self.parts.engine.state()
        state.numbers |= {"step": step, "data": self.parts.loader.state()}
        self.checkpointer.save(step, state, self.parts.job.model_dump(mode="json"), deferred=True)

    def poll(self) -> None:
        """Tell what was published and what went wrong since the last call."""
        for path in self.checkpointer.published[self._told :]:
            self.recorder.event("checkpoint", step=step_of(path.name), path=str(path))
        self._told = len(self.checkpointer.published)
        while self.checkpointer.problems:
            problem = self.checkpointer.problems.pop(0)
            if isinstance(problem.__cause__, FencedError):
                continue  # the records are another start's now; the run ends after this step
            self.recorder.event("warning", message=f"no checkpoint: {problem}", about="checkpoint")

    def finish(self) -> bool:
        """Wait until nothing is being written; whether the last save was published. Collective."""
        published = self.checkpointer.wait()
        self.poll()
        return published

    def close(self) -> None:
        self.checkpointer.close()
        self.poll()


def choose(folder: Path, world: World) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose digests agree, and what is wrong with newer ones; equal on all ranks.

    Raises:
        CheckpointError: there are checkpoints, and none of them is whole.
    """
    step, warnings = -1, []
    if world.main and list_checkpoints(folder):
        path, problems = newest_good(folder)
        warnings = [f"checkpoint passed over: {problem}" for problem in problems]
        step = step_of(path.name) or 0 if path else -2
    step = int(world.sum(step if world.main else 0, along=AXES)[0])
    if step == -2:
        found = "; ".join(warnings) or "see the first rank's message"
        raise CheckpointError(f"{folder} holds no checkpoint that is whole: {found}. Begin anew with --fresh")
    return (folder / folder_name(step) if step >= 0 else None), warnings


def restore(parts: Parts, path: Path) -> tuple[int, list[str]]:
    """Load weights, moments, counters and the data cursor; the step, and what changed in the data.

    An imported run has weights only: its optimizer and its data begin anew.
    """
    state, imported = parts.engine.state(), read_manifest(path).numbers.get("imported")
    if imported:
        notes = from_checkpoint(weights_of(parts.engine), path, parts.job, parts.world.everyone)
        parts.engine.weights_changed()
        return 0, [f"the weights were imported from {imported}, training begins here", *notes]
    group = parts.world.everyone
    numbers: dict[str, Any] = load(path, state, verify=False, group=group)  # `choose` has verified it
    parts.engine.load(State({}, numbers))
    return int(numbers["step"]), parts.loader.load(numbers["data"])


def weights_only(parts: Parts, start: str) -> None:
    """Begin a new run with the weights of a checkpoint, a run's newest one, or a folder of Hugging Face."""
    notes = start_from(weights_of(parts.engine), parts.job, start, parts.world.everyone)
    parts.engine.weights_changed()
    if parts.world.main:
        print("".join(f"  {note}\n" for note in notes), end="")


def weights_of(engine: BaseEngine) -> dict[str, Tensor]:
    """The weights, without moments and averages; those of other stages of a pipeline without values."""
    tensors = engine.elsewhere() | engine.state().tensors
    return {name: tensor for name, tensor in tensors.items() if is_weight(name)}
