"""Which parameters decay, and which are moved by Muon: decided by name and number of dims alone."""

from __future__ import annotations

from torch import Tensor


def decays(parameter: Tensor) -> bool:
    """Weights of two dims and more decay; biases, norm gains and other vectors and scalars do not.

    Embeddings and position tables are matrices and decay too, as in nanoGPT's and minGPT's GPT-2.
    """
    return parameter.ndim >= 2


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """A weight of two dims or more inside `blocks`: what Muon is for. Embeddings and the head are outside."""
    return parameter.ndim >= 2 and "blocks" in name.split(".")
