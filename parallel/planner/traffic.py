"""Bytes that a step moves along each axis of the mesh, from the configuration alone.

A payload is what a collective is about: the tensor that is reduced, the whole that is gathered or scattered, what a
rank has to exchange or to send. `sent` turns it into the bytes that leave a rank. All formulas give what one rank
takes part in, in one optimizer step.

Shapes: P parameters, B rows of a micro-batch, S sequence, E hidden size, H query heads, K key/value heads, D head
dimension, m micro-batches, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from headway.parallel.mesh import Layout
from headway.pretrain.config import Job
from headway.pretrain.models.cost import norm
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.mae import decoder_shape
from headway.pretrain.models.sizes import Parameters, parameters

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send", "receive"]


class Moved(NamedTuple):
    """Payload of the collectives of one kind along one axis (or several: `replicate+shard`)."""

    axis: str
    kind: str
    bytes: float


def sent(kind: str, payload: float, ranks: int) -> float:
    """Bytes that leave a rank: the least that is possible, which rings reach (Patarasuk and Yuan 2009).

    An all-reduce is a reduce-scatter and an all-gather; each passes (n - 1)/n of the payload on. What is received is
    counted where it is sent.
    """
    share = (ranks - 1) / ranks
    factors = {"all_reduce": 2 * share, "broadcast": share, "send": 1.0, "receive": 0.0}
    return payload * factors.get(kind, share)


def added(moves: Iterable[Moved]) -> dict[tuple[str, str], float]:
    """(axis, kind) -> bytes; what moves nothing is left out."""
    total: dict[tuple[str, str], float] = {}
    for axis, kind, size in moves:
        if size:
            total[axis, kind] = total.get((axis, kind), 0) + size
    return total


# -- data parallelism ------------------------------------------------------------------------------------------


def replicated(gradient_bytes: float, axis: str = "replicate") -> list[Moved]:
    """DDP: one all-reduce of all gradients, in the last micro-batch. Sent: 2 P (n - 1)/n, ZeRO's "2 P"."""
    return [Moved(axis, "all_reduce", gradient_bytes)]


def sharded(
    blocks: float,
    rest: float,
    micro_batches: int = 1,
    *,
    reshard: bool,
    gradients: float = 1.0,
    uses: int = 1,
    axis: str = "shard",
) -> list[Moved]:
    """FSDP2, ZeRO (Rajbhandari et al. 2020, section 7): every parameter is gathered for the forward, and again for the
    backward where it was freed meanwhile; gradients are reduce-scattered once, in the last micro-batch.

    With one micro-batch that is 2 P without resharding (ZeRO-2) and 3 P with it (ZeRO-3). What is outside of the
    blocks is never freed between forward and backward. Parameters whose first dim the ranks do not divide are filled
    up: see `padded`.

    Args:
        blocks: bytes of the parameters of blocks.
        rest: bytes of the other parameters.
        reshard: `parallel.reshard`.
        gradients: bytes of a reduced gradient over those of its parameter.
        uses: how often a block is used in a forward (ALBERT's layers over its `unique_layers`).
    """
    gathers = uses * (2 if reshard else 1)
    return [
        Moved(axis, "all_gather", micro_batches * (gathers * blocks + rest)),
        Moved(axis, "reduce_scatter", gradients * (blocks + rest)),
    ]


def padded(shape: tuple[int, ...], ranks: int) -> int:
    """Elements of a parameter as FSDP2 moves it: its first dim is filled up to a multiple of the ranks."""
    rows, rest = (shape[0] if shape else 1), 1
    for size in shape[1:]:
        rest *= size
    return -(-rows // ranks) * ranks * rest


def in_blocks(job: Job, inputs: Inputs, count: Parameters) -> int:
    """Parameters that blocks own: `count.blocks` less T5's tables, which stacks own, and with MAE's decoder."""
    model, mae = job.model, job.objective.mae
    if model.family == "t5" and model.positions == "relative":
        return count.blocks - 2 * model.relative_buckets * model.heads
    if model.family == "vit" and job.objective.name == "mae":
        small = decoder_shape(model, mae)
        norms = norm(model, 1).parameters
        pixels = model.vision.patch**2 * inputs.channels
        outside = norms * (model.hidden + small.hidden) + small.hidden * (model.hidden + 2 + pixels) + pixels
        return count.blocks + count.heads - outside
    return count.blocks


def idle(job: Job) -> int:
    """Parameters that take no gradient: BERT's pooler where nothing is asked of pairs."""
    wide = job.model.hidden
    used = job.model.family != "bert" or job.objective.masking.pairs != "none"
    return 0 if used or not job.model.pooler else wide * wide + wide


def data_parallel(job: Job, inputs: Inputs, layout: Layout, micro_batches: int = 1) -> list[Moved]:
    """Parameters and gradients of the native engine's DDP, FSDP2 and HSDP; exact where ranks divide every first dim.

    HSDP reduces what is left of gradients after the reduce-scatter along `replicate`: P / shard.
    """
    width, count = (8 if job.precision == "fp64" else 4), parameters(job, inputs)
    inner = layout.shard * layout.context
    trained = width * (count.total - idle(job))
    if inner == 1:
        return replicated(trained) if layout.replicate > 1 else []
    blocks = width * in_blocks(job, inputs, count)
    rest = width * count.total - blocks
    axis = "+".join(name for name in ("shard", "context") if getattr(layout, name) > 1)
    gathered = sharded(blocks, rest, micro_batches, reshard=job.parallel.reshard, gradients=0, axis=axis)
    moves = [*gathered, Moved(axis, "reduce_scatter", trained)]
    return moves + (replicated(trained / inner) if layout.replicate > 1 else [])


# -- tensor parallelism ----------------------------------------------------------------------------------------


def tensor_layer(activation: float, micro_batches: int = 1, *, sequence: bool = False) -> list[Moved]:
    """A block under tensor parallelism (Shoeybi et al. 2019, section 3): four all-reduces of B S E, after attention and
    feed-forward in the forward (g), before them in the backward (f).

    With sequence parallelism (Korthikanti et al. 2022, section 4.2.2) each is a reduce-scatter and an all-gather of
    the same payload, in turn at the two ends of a layer: the bytes that are sent are the same.

    Args:
        activation: bytes of B S E.
        sequence: activations outside of the products are cut along the sequence.
    """
    if not sequence:
        return [Moved("tensor", "all_reduce", 4 * micro_batches * activation)]
    return [
        Moved("tensor", "all_gather", 4 * micro_batches * activation),
        Moved("tensor", "reduce_scatter", 4 * micro_batches * activation),
    ]


def sequence_ends(activation: float, micro_batches: int = 1) -> list[Moved]:
    """Both ends of a stack of blocks under sequence parallelism: what comes out is gathered in the forward, and the
    gradient of what went in in the backward.

    Args:
        activation: bytes of B S E.
    """
    return [Moved("tensor", "all_gather", 2 * micro_batches * activation)]


def vocabulary(activation: float, row: float, micro_batches: int = 1) -> list[Moved]:
    """Embedding, head and loss over a vocabulary that is cut (Shoeybi et al. 2019, section 3): the embedding's sum in
    the forward and the gradient of the head's input in the backward, B S E each; the loss exchanges the maximum, the
    sum of exponentials and the label's logit, B S numbers each, in place of the logits.

    Args:
        activation: bytes of B S E.
        row: bytes of B S numbers of the loss.
    """
    return [Moved("tensor", "all_reduce", micro_batches * (2 * activation + 3 * row))]


# -- context parallelism ---------------------------------------------------------------------------------------


def ring(
    keys_values: float,
    ranks: int,
    micro_batches: int = 1,
    layers: int = 1,
    *,
    gradients: float = 1.0,
    stops: int | None = None,
) -> list[Moved]:
    """Ring attention (Liu et al. 2023, section 3): every rank's keys and values visit every other rank, c - 1 sends in
    the forward; in the backward they go round again, and their gradients with them, one send more, home.

    Args:
        keys_values: bytes of a rank's own keys and values, 2 B (S / c) K D.
        gradients: bytes of a gradient's number over those of a key's (2 if fp32 goes with bf16).
        stops: ranks whose keys a rank needs, itself among them; all if None. With a window shorter than a chunk of the
            zigzag these are its two neighbours.
    """
    stops = ranks if stops is None else stops
    forward, backward = stops - 1, (stops - 1) + gradients * stops
    size = micro_batches * layers * keys_values * (forward + backward) if ranks > 1 else 0
    return [Moved("context", "send", size), Moved("context", "receive", size)]


def ulysses(queries: float, keys_values: float, micro_batches: int = 1, layers: int = 1) -> list[Moved]:
    """Ulysses (Jacobs et al. 2023, section 3.2): four all-to-alls of a layer's forward, for queries, keys, values and
    outputs, and their four inverses in the backward.

    Args:
        queries: bytes of a rank's queries, B (S / c) H D; outputs have as many.
        keys_values: bytes of a rank's keys and values, 2 B (S / c) K D.
    """
    return [Moved("context", "all_to_all", 2 * micro_batches * layers * (2 * queries + keys_values))]


# -- pipeline and experts --------------------------------------------------------------------------------------


def pipeline(activation: float, stage: int, stages: int, micro_batches: int = 1) -> list[Moved]:
    """A rank's sends with one stage a rank: activations to the next stage and their gradients to the one before, B S E
    for each micro-batch (Narayanan et al. 2021, section 2.2). Interleaved schedules with v stages a rank send v times
    as much, less where stages that follow each other are on one rank.

    Args:
        activation: bytes of what passes between two stages.
        stage: of this rank, from 0.
    """
    onward, back = micro_batches * (stage < stages - 1), micro_batches * (stage > 0)
    return [
        Moved("pipeline", "send", activation * (onward + back)),
        Moved("pipeline", "receive", activation * (onward + back)),
    ]


def experts(tokens: float, width: float, top_k: int, layers: int = 1, *, axis: str = "expert") -> list[Moved]:
    """Tokens to their experts and back (Lepikhin et al. 2020, section 3.2), in the forward and in the backward.

    Args:
        tokens: of this rank in a step.
        width: bytes of a token's hidden state.
    """
    return [Moved(axis, "all_to_all", 4 * layers * tokens * top_k * width)]
