"""How an objective is spread along the context axis: cores, routers and hooks; parameters stay as they are."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from headway.parallel.context import maps
from headway.parallel.context.batches import CUTS, Slicer, gather_columns
from headway.parallel.context.core import ContextCore
from headway.parallel.context.exchange import Team
from headway.parallel.context.routing import RowRouter
from headway.parallel.mesh import World
from headway.pretrain.config import Job
from headway.pretrain.models.attention import Attention
from headway.pretrain.models.moe import MoE
from headway.pretrain.models.transformer import Stack
from headway.pretrain.objectives import Objective
from headway.pretrain.objectives.classify import Classifier
from headway.pretrain.objectives.distill.match import Match
from headway.pretrain.objectives.masked import MaskedLM


def spread(objective: Objective, job: Job, world: World) -> None:
    """Let the objective's forward read this rank's columns of whole batches, and return its share of the loss.

    Anything else that calls the model (maps, logits, reconstructions) has all columns on every rank.
    """
    slicer = slicer_of(objective, world)
    team, cut = slicer.team, slicer.cut
    for module in list(objective.modules()):
        if isinstance(module, Attention):
            module.core = ContextCore(module.core, team, job.parallel.context_method)
        elif isinstance(module, MoE):
            module.choose = RowRouter(team)
    objective.register_forward_pre_hook(slicer.before)
    objective.register_forward_hook(slicer.after)
    if not cut.sequences:  # images: heads read whole sequences
        for module in objective.modules():
            if isinstance(module, Stack):
                module.register_forward_hook(gather_columns(team))
    if isinstance(objective, Classifier):
        objective.outputs = None  # a rank without the class token has work in the last block too
    if objective.distillation is not None:
        _spread_distillation(objective, team, by_columns=bool(cut.sequences))
    if isinstance(objective, MaskedLM) and (reader := objective.model.pooler or objective.pair):
        reader.register_forward_pre_hook(_take_first(team))


def slicer_of(objective: Objective, world: World) -> Slicer:
    """What cuts the objective's batches into the columns of this rank."""
    team = Team(world.group("context"), world.layout.context, world.place("context"))
    return Slicer(team, next(cut for kind, cut in CUTS.items() if isinstance(objective, kind)))


def _spread_distillation(objective: Objective, team: Team, *, by_columns: bool) -> None:
    """Taps compare the columns that are here with all keys; last hidden states are cut if the objective's columns
    are."""
    distillation = objective.distillation
    assert distillation is not None
    here = partial(_columns, team=team)
    distillation.ranks = team.ranks
    if by_columns:
        distillation.total, distillation.here = team.sum, here
    else:
        distillation.share = 1 / team.ranks
    for tap in (module for module in objective.modules() if isinstance(module, Match)):
        tap.maps, tap.rows, tap.here = partial(maps.compare, team), partial(maps.contrast, team), here


def _columns(x_BT: torch.Tensor, team: Team) -> torch.Tensor:
    """This rank's columns of all."""
    return torch.cat([x_BT[:, run.start : run.stop] for run in team.runs(x_BT.shape[1])], 1)


def _take_first(team: Team) -> Any:
    @torch.compiler.disable
    def hook(reader: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (team.first(args[0]),)

    return hook
