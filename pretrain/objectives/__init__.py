"""What is minimised: an objective turns rows into batches, and owns head and loss."""

from headway.pretrain.objectives.build import build_objective
from headway.pretrain.objectives.causal import CausalLM, LossOutput

__all__ = ["CausalLM", "LossOutput", "build_objective"]
