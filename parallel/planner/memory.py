"""Peak bytes of an optimizer step on one rank, from the configuration alone.

Model states are those of ZeRO (Rajbhandari et al. 2020, section 3.1): parameters, gradients and AdamW's two moments, w
bytes a number each, 4 w Psi together, divided by the ranks that share them (stage 3, `parallel.reshard`), or all but
the gathered parameters (stage 2). Activations are those of `activations`. The peak is the largest of a few moments: in
the loss, in the backward of some block, at the end of the backward, in the optimizer.

Bytes of tensors; what an operator uses inside is not counted, nor what an allocator wastes. Compiled blocks keep
less than this: the compiler fuses and computes again what is cheap. Not counted either: what is sent to experts on
other ranks (`parallel.expert`), which depends on the routing. Of schedules with several stages a rank it is a bound:
all micro-batches of all of its stages are counted as under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from headway.kernels.cross_entropy import chunk_rows
from headway.parallel.context.layout import columns
from headway.parallel.planner.activations import Place, Policy, kept, matrices
from headway.parallel.planner.places import Run, ends, held, places, towers
from headway.parallel.planner.transients import own_peak
from headway.pretrain.models.sizes import block_cost, parameters


class Part(NamedTuple):
    """Bytes that are alive, and what they are."""

    name: str
    bytes: float


@dataclass(frozen=True)
class Moment:
    """What is alive at one time."""

    name: str
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> float:
        return sum(part.bytes for part in self.parts)


def policies(run: Run) -> list[Policy]:
    """What every use of a block computes again, by the job's settings, `budget` aside."""
    settings = run.job.parallel
    if settings.recompute == "budget":
        raise ValueError("a budget is settled by headway.parallel.recompute.budget.choose")
    if settings.recompute != "full":
        return [settings.recompute] * len(places(run))
    number, found = 0, list[list[Policy]]()
    for tower in towers(run):  # counted over the whole model, wherever its blocks are
        chosen = list[Policy]()
        while len(chosen) < len(tower):
            number += 1
            policy: Policy = "full" if number % settings.recompute_every == 0 else "none"
            chosen += [policy] * tower[len(chosen)].uses
        found.append(chosen)
    if run.layout.pipeline == 1:
        return [policy for chosen in found for policy in chosen]
    return [chosen[use] for chosen, uses in zip(found, held(run), strict=True) for use in uses]


def by_block(run: Run, chosen: Sequence[Policy]) -> list[Policy]:
    """One policy for every block: where its uses differ, the one that keeps least."""
    blocks, found, i = places(run), list[Policy](), 0
    while i < len(blocks):
        uses = range(i, i + blocks[i].uses)
        found.append(min((chosen[j] for j in uses), key=lambda policy: kept(blocks[uses[0]], policy)))
        i += len(uses)
    return found


def peak(run: Run, chosen: Sequence[Policy] | None = None) -> Moment:
    """The moment of a step at which most is alive.

    Args:
        run: what memory depends on.
        chosen: a policy for every use of a block; by the job's settings if not given.
    """
    return max(moments(run, chosen or policies(run)), key=lambda moment: moment.bytes)


def moments(run: Run, chosen: Sequence[Policy]) -> list[Moment]:
    """What is alive at the times that may be the peak.

    Of a pipeline, while as many micro-batches are under way as ever are, and in the last of its backwards that finds
    gradients of others.
    """
    blocks, whole = places(run), 0.0
    if not _buckets(run):
        whole = run.wide * _count(run, blocks) / (1 if run.layout.pipeline > 1 else run.spread)
    found = _of_micro_batch(run, chosen, run.flight - 1, whole if run.micros > run.flight else 0.0)
    if 1 < run.flight == run.micros:
        found += _of_micro_batch(run, chosen, run.flight - 2, whole)
    states = (*_states(run), *_waiting(run))
    if ends(run)[0]:
        done, head = _gradients(run, blocks), _head_gradient(run)
        root = Part("gathered parameters around the blocks", _root(run, blocks) if run.gathers else 0)
        found.append(Moment("end of the backward", (*states, done, head, root, _embedding(run))))
    gradients = 0 if _buckets(run) else run.wide * _count(run, blocks) / run.spread
    return [*found, Moment("optimizer", (*states, Part("gradients", gradients)))]


def _of_micro_batch(run: Run, chosen: Sequence[Policy], others: int, earlier: float) -> list[Moment]:
    """Moments of a micro-batch, with so many others under way and bytes of gradients of earlier ones."""
    blocks, last = places(run), ends(run)[1]
    left = [kept(p, policy) for p, policy in zip(blocks, chosen, strict=True)]
    around, norm = _around(run), _final_norm(run)
    head = _head_gradient(run) if last else Part("gradient of the head", 0)
    always = (
        *_states(run),
        *_waiting(run),
        Part("gradients of earlier micro-batches", earlier),
        Part("activations of other micro-batches", others * (sum(left) + _passed(run))),
        around,
    )
    after = gathered(run, blocks, None)
    found = [
        Moment(f"loss, {name}", (*always, Part("activations", sum(left)), norm, part, after))
        for name, part in (_loss(run, chosen, blocks) if last else {}).items()
    ]
    for i, (p, policy) in enumerate(zip(blocks, chosen, strict=True)):
        alive = (
            Part("activations of earlier blocks", sum(left[:i])),
            Part("activations and their gradients in the block", own_peak(p, policy)),
            Part("gradients of later blocks", 0) if earlier else _gradients(run, blocks[i + 1 :]),
            gathered(run, blocks, i),
            head,
        )
        found.append(Moment(f"backward of block {i}", (*always, *alive)))
    return found


def _stream(run: Run) -> float:
    """What travels between stages, of a micro-batch."""
    blocks = places(run)
    return float(run.wide * blocks[0].keys * run.job.model.hidden)


def _waiting(run: Run) -> tuple[Part, ...]:
    """What torch's pipeline stages receive into: a buffer for every micro-batch, in both directions."""
    if run.layout.pipeline == 1:
        return ()
    first, last = ends(run)
    return (Part("buffers between stages", run.micros * _stream(run) * ((not first) + (not last))),)


def _passed(run: Run) -> float:
    """What a micro-batch that is under way holds beside its blocks' activations: what was sent on, or what the loss
    keeps, which are gradients already."""
    if not ends(run)[1]:
        return _stream(run)
    width = run.job.model.embedding_size or run.job.model.hidden
    return _final_norm(run).bytes + run.wide * (_scored(run) * width + _head(run))


def gathered(run: Run, blocks: Sequence[Place], i: int | None) -> Part:
    """What FSDP2 has gathered, and its flat buffers, in the backward of block i, or in the loss (None).

    Parameters around the blocks stay gathered. Of the blocks (ZeRO-3), in the loss: the buffer from which the last one
    was copied. In a backward: its own parameters, the buffer of the one before it, fetched ahead, and the gradients of
    the one after it on their way. Where they stay gathered (ZeRO-2): those up to the block, and those gradients.
    """
    name = "gathered parameters and buffers"
    if not run.gathers:
        return Part(name, 0)
    last, keeps = len(blocks) - 1, not run.job.parallel.reshard or run.layout.pipeline > 1
    numbers = [block_parameters(p) for p in blocks]
    total = _root(run, blocks)
    if i is None:
        total += run.wide * (
            numbers[last] + (sum(n / p.uses for n, p in zip(numbers, blocks, strict=True)) if keeps else 0)
        )
        return Part(name, total)
    before = sum(n / p.uses for n, p in zip(numbers[:i], blocks[:i], strict=True))
    ahead = before if keeps else numbers[i - 1] if i else 0
    after = numbers[i + 1] if i < last else 0
    return Part(name, total + run.wide * (numbers[i] + ahead + after))


def around_blocks(run: Run) -> tuple[float, float]:
    """Bytes of a micro-batch's activations beside those of blocks, in the loss and in the backward of blocks."""
    blocks = places(run)
    around = _around(run).bytes
    if not ends(run)[1]:
        return around, around
    loss = max(part.bytes for part in _loss(run, ["full"] * len(blocks), blocks).values())
    return around + _final_norm(run).bytes + loss, around + _head_gradient(run).bytes


def activation_peak(run: Run, chosen: Sequence[Policy]) -> float:
    """Most bytes of a micro-batch's activations, and of gradients on their way, that are alive at a time."""
    in_loss, in_backward = around_blocks(run)
    highest = alive = 0.0
    for p, policy in zip(places(run), chosen, strict=True):
        highest = max(highest, in_backward + alive + own_peak(p, policy))
        alive += kept(p, policy)
    return max(highest, in_loss + alive)


def block_parameters(p: Place) -> int:
    """Of one rank, before FSDP2 spreads them."""
    return block_cost(p.model, p.layer, p.length, p.causal, p.memory).parameters


def _count(run: Run, blocks: Sequence[Place]) -> float:
    """Numbers in the parameters of this rank, before FSDP2 spreads them."""
    return _root(run, blocks) / run.wide + sum(block_parameters(p) / p.uses for p in blocks)


def _root(run: Run, blocks: Sequence[Place]) -> float:
    """Bytes of the parameters of this rank that are in no block."""
    m, words, first = run.job.model, _words(run), ends(run)[0]
    every, width = parameters(run.job, run.inputs), m.embedding_size or m.hidden
    whole = [p for tower in towers(run.whole) for p in tower]
    biases = m.heads * m.relative_buckets * (2 if m.family == "t5" else 1) if m.positions == "relative" else 0
    heads = every.total - every.embedding - biases - sum(block_parameters(p) / p.uses for p in whole)
    lost = run.inputs.vocab - words  # rows that other tensor ranks have
    heads -= lost * (0 if m.tied else width) + (lost if run.job.objective.name == "masked" else 0)
    found = biases / run.layout.tensor
    if first:
        found += every.embedding - lost * width
    if ends(run)[1]:
        found += heads + (words * width if m.tied and not first else 0)
    return run.wide * found


def _words(run: Run) -> int:
    """Rows of the table of words on this rank."""
    return -(-run.inputs.vocab // run.layout.tensor)


def _states(run: Run) -> tuple[Part, ...]:
    count = _count(run, places(run)) * run.wide / run.spread
    states = Part("parameters", count), Part("moments", 2 * count)
    return (*states, Part("gradients in buckets", count)) if _buckets(run) else states


def _buckets(run: Run) -> bool:
    """Whether gradients live in DDP's buckets, which are never freed."""
    return run.layout.replicate > 1 and not run.gathers


def _gradients(run: Run, blocks: Sequence[Place]) -> Part:
    """Of the parameters of these blocks, whose backward is over."""
    own = sum(block_parameters(p) / p.uses for p in blocks)
    return Part("gradients of later blocks", 0 if _buckets(run) else run.wide * own / run.spread)


def _around(run: Run) -> Part:
    """The batch, and what embeddings keep."""
    m, i = run.job.model, run.inputs
    tokens = run.rows * (i.length + i.target_length)
    here = tokens / run.layout.context if ends(run)[0] else 0
    masks = here * m.hidden if m.dropout else 0
    turn = run.wide * i.length / run.layout.context * m.head_width if m.positions == "rotary" else 0
    batch = 16 * tokens * run.micros + (16 * here if run.layout.context > 1 else 0)
    return Part("batch and embeddings", batch + turn + masks + _biases(run))


def _biases(run: Run) -> float:
    """Of relative positions, a tower each: scores' bias, buckets, and the gradient in which blocks add up theirs."""
    m = run.job.model
    if m.positions != "relative":
        return 0.0
    pairs = sum(t[0].length * t[0].length * run.layout.context for t in towers(run))
    return pairs * (8 + 2 * run.wide * m.heads / run.layout.tensor)


def _asked(run: Run) -> int:
    """Tokens of the last tower on this rank."""
    return run.rows * columns(run.inputs.target_length or run.inputs.length, run.layout.context, 0)


def _final_norm(run: Run) -> Part:
    """The last block's output, before the norm."""
    m = run.job.model
    normed = m.norm_position == "pre" and m.norm != "none"
    return Part("final norm", run.wide * _asked(run) * (m.hidden + 2) if normed else 0)


def _scored(run: Run) -> float:
    """Tokens that meet the head."""
    masked = run.job.objective.name == "masked"
    return _asked(run) * (run.job.objective.masking.rate if masked else 1)


def _head(run: Run) -> int:
    """Numbers in the head's matrix, on this rank."""
    m = run.job.model
    return _words(run) * (m.embedding_size or m.hidden)


def _head_gradient(run: Run) -> Part:
    return Part("gradient of the head", run.wide * _head(run))


def _embedding(run: Run) -> Part:
    """The gradient that comes to the embedding, and that of its table."""
    tokens = run.rows * columns(run.inputs.length, run.layout.context, 0)
    return Part("gradient of the embedding", run.wide * (tokens * run.job.model.hidden + _head(run)))


def _loss(run: Run, chosen: Sequence[Policy], blocks: Sequence[Place]) -> dict[str, Part]:
    """Head and cross-entropy in chunks, forward and backward (kernels/cross_entropy.py)."""
    w, n, matrix, tokens = run.wide, run.narrow, _head(run), _scored(run)
    if not matrix:
        return {"forward": Part("loss", 0)}
    cast, width = n != w, run.job.model.embedding_size or run.job.model.hidden
    words = _words(run)
    chunks = -(-tokens // chunk_rows(words, n if run.layout.tensor == 1 else 4, run.device))
    logits = -(-tokens // chunks) * words
    forward = w * tokens * width + n * tokens * width + w * matrix  # final states; gradients of both
    # Logits, widened, log-softmax; of words in parts differences and exponentials (tensor/vocabulary.py).
    forward += logits * (n + (w if cast else 0) + w * (1 if run.layout.tensor == 1 else 2))
    forward += n * (tokens * width + 2 * matrix) if cast else 0  # narrowed states and weights, a product
    if cast:  # autocast keeps its copies of weights to the end of the forward
        again = (p for p, policy in zip(blocks, chosen, strict=True) if policy in ("full", "products"))
        forward += sum(n * matrices(p) for p in again)
    backward = (n + w) * tokens * width + 2 * w * matrix
    return {"forward": Part("loss", forward), "backward": Part("loss", backward)}
