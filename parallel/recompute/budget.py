"""`recompute: budget`: what each block computes again, so that activations fit and recomputation is least."""

from __future__ import annotations

from typing import NamedTuple

from headway.kernels.attention.registry import mechanism
from headway.parallel.planner.activations import Place, Policy, kept, table, total
from headway.parallel.planner.memory import activation_peak, around_blocks
from headway.parallel.planner.places import Run, places
from headway.parallel.planner.transients import own_peak
from headway.pretrain.errors import JobError
from headway.pretrain.models.attention import attention_shape, word_of
from headway.pretrain.models.seat import Seat
from headway.pretrain.models.sizes import block_cost

GIB = 2**30
POLICIES: tuple[Policy, ...] = ("none", "products", "attention", "full")
BYTE = 4.0
"""FLOPs that a byte of a norm's or an activation's output costs: about as many as those of a product that a processor
does while it writes the byte, or fewer; products weigh more than they do."""


class Choice(NamedTuple):
    """What a policy does to a block: bytes from forward to backward, most bytes in its backward, FLOPs again."""

    policy: Policy
    kept: float
    own: float
    cost: float


class _State(NamedTuple):
    """Blocks decided so far: bytes that they keep, FLOPs that they compute again, and how."""

    kept: float
    cost: float
    chosen: tuple[Policy, ...]


def choose(run: Run, budget: float) -> list[Policy]:
    """A policy for every use of a block: the least FLOPs with at most `budget` bytes of activations at any time.

    Exact, block by block in order: of two ways to decide the first blocks, one that keeps and costs no less than the
    other is dropped. A block's backward runs with the earlier blocks' tensors alive, so only their sum matters.

    Raises:
        JobError: not even whole blocks computed again fit.
    """
    blocks, (in_loss, in_backward) = places(run), around_blocks(run)
    states = [_State(0.0, 0.0, ())]
    for choices in (_choices(p) for p in blocks):
        found = [
            _State(s.kept + c.kept, s.cost + c.cost, (*s.chosen, c.policy))
            for s in states
            for c in choices
            if s.kept + c.own + in_backward <= budget
        ]
        states = _best(found)
    fitting = [s for s in states if s.kept + in_loss <= budget]
    if not fitting:
        raise too_small(budget, least(run), run.rows)
    return list(min(fitting, key=lambda s: (s.cost, s.kept)).chosen)


def least(run: Run) -> float:
    """Bytes of activations with all blocks computed again."""
    return activation_peak(run, ["full"] * len(places(run)))


def too_small(budget: float, needed: float, rows: int) -> JobError:
    """The refusal of a budget; both in bytes."""
    rule = f"with all blocks computed again, activations of {rows} rows take {needed / GIB:.4g} GiB"
    nearest = float(f"{needed / GIB * 1.001:.4g}")
    return JobError("parallel.recompute_budget", round(budget / GIB, 6), rule, nearest)


def _best(states: list[_State]) -> list[_State]:
    """Those that no other beats in both bytes and FLOPs."""
    best: list[_State] = []
    for state in sorted(states, key=lambda s: (s.kept, s.cost)):
        if not best or state.cost < best[-1].cost:
            best.append(state)
    return best


def _choices(p: Place) -> list[Choice]:
    return [Choice(policy, kept(p, policy), own_peak(p, policy), cost(p, policy)) for policy in POLICIES]


def cost(p: Place, policy: Policy) -> float:
    """FLOPs that a micro-batch computes again in a block; a byte of what is not a product counts BYTE of them."""
    if policy == "none":
        return 0.0
    terms = table(p)
    seat = Seat(p.layer, p.causal, tokens=p.length)
    word = word_of(p.model.attention, seat)
    core = p.rows * mechanism(word).flops(attention_shape(p.model, word, seat))
    if policy == "attention":
        return core + BYTE * total(term for term in terms if term.part == "attention")
    others = BYTE * total(term for term in terms if not term.product)
    if policy == "products":
        fused = any(term.product for term in terms if term.part == "attention")
        return others + (0.0 if fused else core)
    return others + p.rows * block_cost(p.model, p.layer, p.length, p.causal, p.memory).flops
