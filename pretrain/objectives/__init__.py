"""What is minimised: an objective turns rows into batches, and owns head and loss."""

from headway.pretrain.objectives.base import LossOutput, Mean, Objective
from headway.pretrain.objectives.build import build_objective

__all__ = ["LossOutput", "Mean", "Objective", "build_objective"]
