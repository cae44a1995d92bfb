"""A teacher on ranks of its own: the student's ranks send rows and take answers, the teacher's answer until they are
told to stop.

Rows of all micro-batches go out at once, and a teacher answers in their order: it computes the next while the student
is busy with the last. What shapes answers have is told once for each kind of step.

Shapes: see `headway.parallel.distill.teacher`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from headway.parallel.distill.redistribute import Item
from headway.parallel.distill.routes import Routes
from headway.parallel.distill.teacher import READS, compute, delivered, sizes_of, with_others
from headway.parallel.distill.teaching import Teaching
from headway.parallel.mesh import World
from headway.parallel.pipeline.messages import Messages
from headway.pretrain.engine import Batch
from headway.pretrain.objectives.distill.distillation import Wanted

Forms = list[tuple[str, str, list[int]]]
"""(name, dtype, sizes of all dims but the first) of tensors."""


class FarTeacher:
    """The student's side."""

    def __init__(self, routes: Routes, world: World, messages: Messages) -> None:
        """
        Args:
            routes: between student and teacher.
            world: of the student.
            messages: over all ranks of the run.
        """
        self.routes, self.world, self.messages = routes, world, messages
        self.forms: dict[str, Forms] = {}

    def signature(self, step: int | None) -> str:
        return str(self.routes.distillation.wanted(step))

    def teach(self, micros: Sequence[Batch], step: int | None) -> Iterator[Batch]:
        wanted = self.routes.distillation.wanted(step)
        sizes = [sizes_of(micro, step, self.routes, self.world) for micro in micros]
        read = [name for name in READS if name in micros[0]]
        asked = {"step": step, "sizes": sizes, "inputs": forms_of({name: micros[0][name] for name in read})}
        self.messages.broadcast(asked, 0)
        for micro, rows in zip(micros, sizes, strict=True):
            path = self.routes.inputs(rows)
            self.routes.exchange([Item(micro[name], path) for name in read])
        kind = kind_of(wanted, asked)
        answers = (self._answer(wanted, rows, kind) for rows in sizes)
        return with_others(answers, micros, sizes, self.routes) if wanted.others else answers

    def _answer(self, wanted: Wanted, sizes: list[int], kind: str) -> Batch:
        if kind not in self.forms:
            self.forms[kind] = self.messages.broadcast(None, self.routes.before)
        return delivered(self.routes, empty(self.forms[kind], self.world.device), wanted, sizes)

    def close(self) -> None:
        """Let the teacher's ranks go. Collective."""
        self.messages.broadcast({"stop": True}, 0)


def serve(
    teaching: Teaching,
    routes: Routes,
    world: World,
    messages: Messages,
    autocast: Callable[[], AbstractContextManager],
) -> None:
    """Answer until the student is done; the teacher's side.

    Args:
        teaching: the teacher, spread over `world`.
        routes: between it and the student.
        world: of the teacher.
        messages: over all ranks of the run.
    """
    told: set[str] = set()
    while "stop" not in (asked := messages.broadcast(None, 0)):
        wanted = routes.distillation.wanted(asked["step"])
        kind = kind_of(wanted, asked)
        blank = empty(asked["inputs"], world.device)
        given = []
        for sizes in asked["sizes"]:
            path = routes.inputs(sizes)
            given.append(
                dict(zip(blank, routes.exchange([Item(x, path) for x in blank.values()]), strict=True))
            )
        for sizes, rows in zip(asked["sizes"], given, strict=True):
            found = compute(teaching, rows, wanted, routes.mine(sizes), autocast)
            if kind not in told:
                told.add(kind)
                messages.broadcast(forms_of(found), routes.before)
            delivered(routes, found, wanted, sizes)
        if wanted.others:
            slot = torch.empty(0, dtype=torch.int64, device=world.device)
            for sizes in asked["sizes"]:
                routes.exchange([Item(slot, routes.slots(sizes))])


def forms_of(tensors: dict[str, Tensor]) -> Forms:
    return [(n, str(x.dtype).removeprefix("torch."), list(x.shape[1:])) for n, x in tensors.items()]


def empty(forms: Forms, device: torch.device) -> Batch:
    """Tensors of no rows."""
    return {n: torch.empty(0, *sizes, dtype=getattr(torch, d), device=device) for n, d, sizes in forms}


def kind_of(wanted: Wanted, asked: dict[str, Any]) -> str:
    """What the forms of answers depend on; equal on all ranks."""
    return f"{wanted} {[list(form) for form in asked['inputs']]}"
