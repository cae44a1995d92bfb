"""Energy of a run over all its ranks: what each measured travels with what they tell each other anyway."""

from __future__ import annotations

import torch

from headway.parallel.mesh import AXES, World, apart
from headway.pretrain.config import Job
from headway.pretrain.energy.counter import Reading
from headway.pretrain.energy.meter import open_meter
from headway.pretrain.records.records import NoRecords, Recorder


class RunEnergy:
    """The meter of this rank among those of all ranks, from now on.

    Raises:
        JobError: `tracking.energy.source` names what is not to be had here.
    """

    def __init__(self, job: Job, world: World) -> None:
        self._world = world
        self._recorder: Recorder = NoRecords()
        settings = job.tracking.energy
        self._meter = open_meter(settings, world.device, world.local_rank, torch.get_num_threads())
        self._teachers, self._seconds = apart(job), 0.0

    def tell(self, recorder: Recorder) -> None:
        """Note what measures. Collective."""
        self._recorder = recorder
        if self._meter is None:
            return
        meter, size = self._meter, self._world.size
        estimates = round(self._world.sum(float(meter.estimate), along=AXES)[0])
        notes = [*meter.notes]
        if 0 < estimates < size:
            notes.append(f"{estimates} of {size} ranks estimate; the source named is that of the first")
        if self._teachers:
            notes.append(f"the {self._teachers} ranks that are the teacher's alone are not read")
        recorder.event("meter", source=meter.source, estimate=estimates > 0, notes=notes)

    def take(self) -> float:
        """Joules of this rank since the last call; 0 where nothing is measured."""
        if self._meter is None:
            return 0.0
        reading = self._meter.take()
        self._seconds = reading.seconds
        for trouble in self._meter.troubles:
            self._recorder.event("warning", message=trouble)
        self._meter.troubles.clear()
        return reading.joules

    def of_all(self, joules: float) -> Reading | None:
        """What all ranks took last, from the sum of it; None where nothing is measured."""
        return None if self._meter is None else Reading(joules, self._seconds)

    def end(self) -> None:
        """Note what was used after the last step: evaluations, checkpoints, scores. Collective."""
        if reading := self.of_all(self._world.sum(self.take(), along=AXES)[0]):
            self._recorder.event("energy", joules=reading.joules, seconds=reading.seconds)

    def close(self) -> None:
        if self._meter:
            self._meter.close()
