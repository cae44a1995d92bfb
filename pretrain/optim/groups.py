"""Which parameters decay, which are moved by Muon, and how deep they lie: decided by name and dims alone.

Canonical names: `...embed...` for embeddings, `...blocks.N...` for blocks, `...decoder...` for all of a decoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor


def decays(name: str, parameter: Tensor) -> bool:
    """Weights of two dims and more decay; biases, norm gains, class and mask tokens and other vectors do not.

    Embeddings, position tables and tables of relative biases are matrices and decay too, as in nanoGPT's and
    minGPT's GPT-2. Biases of expert stacks have two dims and do not; nor does what attention mechanisms own, which are
    vectors of heads, or begin as identities.
    """
    path = name.split(".")
    return parameter.ndim >= 2 and not path[-1].endswith(("bias", "token")) and "own" not in path


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """A weight of two dims or more inside `blocks`: what Muon is for. Stacks of experts are batches of matrices.

    Embeddings and the head are outside; the router, whose outputs are scores of experts as the head's are
    scores of tokens, is left out with them.
    """
    path = name.split(".")
    return decays(name, parameter) and "blocks" in path and "router" not in path


def rate_factors(names: Iterable[str], layer_decay: float) -> dict[str, float]:
    """Factor of each parameter's learning rate: layer_decay ** (L + 1 - depth) for L blocks (Clark et al. 2020).

    Embeddings, position tables and class tokens are at depth 0, block i (from 0) at i + 1, and what follows the
    last block at L + 1, as is what all blocks share (BEiT's relative biases are). The blocks of a decoder lie
    above all of the encoder's.

    Args:
        names: canonical names of all of the model's parameters, for L is the number of blocks found in them.
        layer_decay: 1 gives 1 for all.
    """
    places = {name: _block(name) for name in names}
    encoder, decoder = (
        1 + max((i for above, i in places.values() if above == side and i is not None), default=-1)
        for side in (False, True)
    )
    return {
        name: layer_decay ** (encoder + decoder + 1 - depth)
        for name, depth in _depths(places, encoder, decoder).items()
    }


def _depths(places: Mapping[str, tuple[bool, int | None]], encoder: int, decoder: int) -> dict[str, int]:
    depths = {}
    for name, (above, block) in places.items():
        path = name.split(".")
        if block is not None:
            depths[name] = block + 1 + (encoder if above else 0)
        elif _feeds_blocks(path):  # what a decoder embeds by itself feeds its first block
            depths[name] = encoder if above else 0
        elif "encoder" in path:  # its final norm, which the decoder's first block reads
            depths[name] = encoder + 1
        else:
            depths[name] = encoder + decoder + 1
    return depths


def _feeds_blocks(path: list[str]) -> bool:
    """Embeddings, position tables, class and mask tokens."""
    return path[-1].endswith("token") or any(part.startswith(("embed", "positions")) for part in path)


def _block(name: str) -> tuple[bool, int | None]:
    """Whether a parameter belongs to a decoder, and the number of its block if it is in one."""
    path = name.split(".")
    at = path.index("blocks") + 1 if "blocks" in path else len(path)
    number = int(path[at]) if at < len(path) and path[at].isdigit() else None
    return "decoder" in path[:at], number
