"""sum_j phi(q_i) . phi(k_j) v_j in O(n), for any feature map phi: linear attention, Performer, random features.

The sequence is gone through in segments of a few chunks. Features exist for one segment at a time, forward and
backward: what is kept is queries, keys and values, and a state for each segment.

Shapes: B batch, H query heads, K key/value heads, Q queries, S keys, N chunks, C tokens of a chunk, M features, D head
dimension of queries and keys, or values of a key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.attention.dense import per_query_head
from headway.kernels.attention.linear.scan import Joints, Ties, carried, chunked, exactly, scaled
from headway.kernels.attention.masks import Mask

CHUNK = 128
SEGMENT = {"cpu": 2**20}
"""Features that a segment holds at most, over all rows and heads: on CPU they stay in the cache."""
SEGMENT_ELSEWHERE = 2**26


class Map(NamedTuple):
    """A feature map and its derivative.

    Attributes:
        queries: (x [B, H, Q, D], w [1, H, M, D] or None) -> features [B, H, Q, M].
        keys: (x [B, H, S, D], w, level [B, H, S, 1] or None) -> features [B, H, S, M].
        pull: (x, features, their gradients, w, whether of keys) -> gradients of x, and of w or None.
    """

    queries: Callable[[Tensor, Tensor | None], Tensor]
    keys: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
    pull: Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], tuple[Tensor, Tensor | None]]


Average = Callable[..., Tensor]
"""`average`, or what computes the same."""


def average(
    maps: Map,
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    w_HMD: Tensor | None = None,
    peak_BHS: Tensor | None = None,
    floor: float = 0,
) -> Tensor:
    """sum_j phi(q_i) . phi(k_j) v_j / sum_j phi(q_i) . phi(k_j) over the keys j that query i sees, [B, H, Q, D].

    Args:
        maps: what phi is; queries and keys are fp32 or wider.
        mask: no prefix and no scope; a query that sees nothing gets 0.
        w_HMD: directions that phi reads.
        peak_BHS: greatest logarithm of each key's features, of maps that lessen these by a level: the greatest of the
            key's document up to it (of all its document if not causal). So no exponent is above 0, no later key is
            asked, and what they are lessened by cancels. Takes no gradient.
        floor: what the denominator is raised to if it is less, for features whose products may be negative.
    """
    assert mask[3:] == (None,) * 4, "no prefix, no scope, no parts"
    width, dtype = v_BKSD.shape[-1], v_BKSD.dtype
    keys, values = (per_query_head(x, q_BHQD) for x in (k_BKSD, v_BKSD))
    # Ones are the denominator's values; the zeros beside them keep rows of products aligned.
    values = F.pad(F.pad(values.to(q_BHQD.dtype), (0, 1), value=1.0), (0, 7))
    causal, documents, at = mask.causal, mask.documents, None
    if mask.key_documents is not None:
        assert documents is not None
        assert not causal
        merged = over_documents(q_BHQD, keys, values, documents, mask.key_documents, peak_BHS)
        q_BHQD, keys, values, documents, at, peak_BHS = merged
        causal = True
    level_BHS = None
    if peak_BHS is not None:
        level_BHS = (running_max if causal else document_max)(peak_BHS.detach(), documents)
    out = sums(maps, q_BHQD, keys, values, w_HMD, level_BHS, documents, causal)
    if at is not None:
        out = out.take_along_dim(at[:, None, :, None], 2)
    return divided(out[..., :width], out[..., width : width + 1], floor).to(dtype)


def divided(sums_BHQD: Tensor, weights_BHQ1: Tensor, floor: float = 0) -> Tensor:
    """The mean; 0 where a query sees nothing, and so are its gradients."""
    if floor:
        return sums_BHQD / weights_BHQ1.clamp(min=floor)
    return sums_BHQD / weights_BHQ1.masked_fill(weights_BHQ1 == 0, 1)


def running_max(x_BHS: Tensor, documents: Tensor | None) -> Tensor:
    """Largest value up to each place, of its document where documents [B, S] are given."""
    if documents is None:
        return x_BHS.cummax(-1).values
    documents, reach = documents[:, None], 1
    while reach < x_BHS.shape[-1]:  # each round looks twice as far
        same = documents[..., reach:] == documents[..., :-reach]
        more = torch.where(same, x_BHS[..., :-reach], x_BHS[..., reach:])
        x_BHS = torch.cat([x_BHS[..., :reach], torch.maximum(x_BHS[..., reach:], more)], -1)
        reach *= 2
    return x_BHS


def document_max(x_BHS: Tensor, documents: Tensor | None) -> Tensor:
    """Largest value of each place's document."""
    if documents is None:
        return x_BHS.amax(-1, keepdim=True).expand(x_BHS.shape)
    back = running_max(x_BHS.flip(-1), documents.flip(-1)).flip(-1)
    return torch.maximum(running_max(x_BHS, documents), back)


def sums(
    maps: Map,
    q_BHQD: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    w_HMD: Tensor | None = None,
    level_BHS: Tensor | None = None,
    documents: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """sum_j phi(q_i) . phi(k_j) v_j over the keys j that query i sees, [B, H, Q, D], in fp32 or wider as given.

    Args:
        maps: what phi is.
        w_HMD: directions that it reads.
        level_BHS: what logarithms of keys' features are lessened by; it takes no gradient. If causal, it does not
            fall inside a document, and what a query sums is lessened by its own place's level in all.
        documents: int [B, S], contiguous; a query sees keys of its own.
        causal: only keys up to the query's own place.
    """
    with exactly(q_BHQD):
        if documents is None and not causal:
            return _Whole.apply(maps, q_BHQD, k_BHSD, v_BHSD, w_HMD, level_BHS)
        length = q_BHQD.shape[2]
        chunk = min(CHUNK, length)
        given = (chunked(x, chunk) for x in (q_BHQD, k_BHSD, v_BHSD))
        if documents is not None:
            documents = chunked(documents[:, None], chunk, -1)
        if level_BHS is not None:
            # Behind the end the level is as high as can be, so that it never falls.
            level_BHS = chunked(level_BHS, chunk, float(torch.finfo(level_BHS.dtype).max))
        return _Scan.apply(maps, *given, w_HMD, level_BHS, documents, causal).flatten(2, 3)[:, :, :length]


def segments(parts: int, features: int, device: torch.device) -> list[slice]:
    """So many parts of a sequence, each of so many features over all rows and heads, cut into segments."""
    step = max(1, SEGMENT.get(device.type, SEGMENT_ELSEWHERE) // features)
    return [slice(start, min(parts, start + step)) for start in range(0, parts, step)]


class _Scan(torch.autograd.Function):
    """Chunks [B, H, N, C, D] of queries, keys and values; see `scan.Joints`."""

    @staticmethod
    def forward(ctx, maps, q, k, v, w, level, documents, causal):
        run = _Run(maps, q, k, v, w, level, documents, causal)
        with exactly(q):
            lefts: list[Tensor | None] = []
            left, outs = None, []
            rights = [None] * len(run.parts) if causal else run.states_beyond()
            for part, right in zip(run.parts, rights, strict=True):
                phi_q, phi_k, values, joints = run.of(part)
                out = scaled(phi_q @ phi_k.mT, joints.within) @ values
                lefts.append(left)
                states, left = _passed(phi_k, values, joints, left)
                out += scaled(phi_q, joints.left) @ states
                if not causal:
                    states, _ = _passed(phi_k, values, joints, right, back=True)
                    out += scaled(phi_q, joints.right) @ states
                outs.append(out)
        ctx.save_for_backward(q, k, v, w, level, documents, *lefts[1:], *rights[:-1])
        ctx.maps, ctx.causal = maps, causal
        return torch.cat(outs, 2)

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, w, level, documents, *states = ctx.saved_tensors
        run = _Run(ctx.maps, q, k, v, w, level, documents, ctx.causal)
        more = len(run.parts) - 1
        lefts, rights = [None, *states[:more]], [*states[more:], None]
        with exactly(q):
            # Gradients of states come from the other side.
            d_right = [None] * (more + 1) if ctx.causal else run.gradients_before(d_out)
            d_left, found = None, []
            for i in reversed(range(more + 1)):
                part, d = run.parts[i], d_out[:, :, run.parts[i]]
                phi_q, phi_k, values, joints = run.of(part)
                weights = scaled(phi_q @ phi_k.mT, joints.within)
                d_weights = scaled(d @ values.mT, joints.within)
                gradients = [d_weights @ phi_k, d_weights.mT @ phi_q, weights.mT @ d]
                given = phi_q, phi_k, values, d, joints
                d_left = _add_side(gradients, *given, lefts[i], d_left, back=False)
                if not ctx.causal:
                    _add_side(gradients, *given, rights[i], d_right[i], back=True)
                found.append(run.pulled(part, phi_q, phi_k, *gradients))
        *whole, dw = zip(*reversed(found), strict=True)
        return None, *(torch.cat(x, 2) for x in whole), None if dw[0] is None else sum(dw), None, None, None


class _Run:
    """A scan's tensors, and their features segment by segment."""

    def __init__(self, maps, q, k, v, w, level, documents, causal):
        self.maps, self.q, self.k, self.v, self.level = maps, q, k, v, level
        self.w = None if w is None else w[None]
        self.ties = Ties(q.shape[3], q.device, causal, documents, level if causal else None)
        width = q.shape[-1] if w is None else w.shape[1]
        self.parts = segments(q.shape[2], q.shape[0] * q.shape[1] * q.shape[3] * width, q.device)

    def queries(self, part: slice) -> Tensor:
        """Features [B, H, N, C, M] of a segment."""
        return self._chunks(self.maps.queries(self.q[:, :, part].flatten(2, 3), self.w))

    def keys(self, part: slice) -> Tensor:
        level = None if self.level is None else self.level[:, :, part].flatten(2)[..., None]
        return self._chunks(self.maps.keys(self.k[:, :, part].flatten(2, 3), self.w, level))

    def of(self, part: slice) -> tuple[Tensor, Tensor, Tensor, Joints]:
        """Features of queries and keys, values, and joints."""
        return self.queries(part), self.keys(part), self.v[:, :, part], self.ties.of(part)

    def states_beyond(self) -> list[Tensor | None]:
        """States that reach each segment from the right."""
        states: list[Tensor | None] = []
        state = None
        for part in reversed(self.parts):
            states.append(state)
            _, state = _passed(self.keys(part), self.v[:, :, part], self.ties.of(part), state, back=True)
        return states[::-1]

    def gradients_before(self, d_out: Tensor) -> list[Tensor | None]:
        """Gradients, that reach each segment from the left, of states that go to the left."""
        states: list[Tensor | None] = []
        state = None
        for part in self.parts:
            states.append(state)
            _, state = _passed(self.queries(part), d_out[:, :, part], self.ties.of(part), state)
        return states

    def pulled(self, part, phi_q, phi_k, d_phi_q, d_phi_k, dv):
        """Gradients of queries, keys, values and directions, from those of features."""
        dq, dw_q = self._pulled(self.q[:, :, part], phi_q, d_phi_q, False)
        dk, dw_k = self._pulled(self.k[:, :, part], phi_k, d_phi_k, True)
        return dq, dk, dv, None if dw_q is None else (dw_q + dw_k)[0]

    def _pulled(self, x, phi, d_phi, of_keys):
        dx, dw = self.maps.pull(*(y.flatten(2, 3) for y in (x, phi, d_phi)), self.w, of_keys)
        return self._chunks(dx), dw

    def _chunks(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.ties.chunk))


def _passed(phi, values, joints, state, back=False):
    """States that reach each chunk of a segment, and the one that leaves it."""
    gives = joints.left if back else joints.right
    return carried(scaled(phi, gives).mT @ values, joints.through, state, back)


def _add_side(gradients, phi_q, phi_k, values, d, joints, state, d_state, back):
    """Adds gradients by way of the states from one side; returns the gradient of the state that reaches the segment."""
    reads, gives = (joints.right, joints.left) if back else (joints.left, joints.right)
    given = scaled(phi_k, gives)
    states, _ = carried(given.mT @ values, joints.through, state, back)
    d_states, d_state = carried(scaled(phi_q, reads).mT @ d, joints.through, d_state, not back)
    gradients[0] += scaled(d @ states.mT, reads)
    gradients[1] += scaled(values @ d_states.mT, gives)
    gradients[2] += given @ d_states
    return d_state


class _Whole(torch.autograd.Function):
    """Every query sees every key: one state of all of them, [B, H, M, D]."""

    @staticmethod
    def forward(ctx, maps, q, k, v, w, level):
        ctx.maps = maps
        with exactly(q):
            w_1HMD = None if w is None else w[None]
            state = sum(_keys(maps, k, w_1HMD, level, part).mT @ v[:, :, part] for part in _parts(k, w))
            out = torch.cat([maps.queries(q[:, :, part], w_1HMD) @ state for part in _parts(q, w)], 2)
        ctx.save_for_backward(q, k, v, w, level, state)
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, w, level, state = ctx.saved_tensors
        with exactly(q):
            w_1HMD = None if w is None else w[None]
            d_state, dqs, dks, dvs, dws = torch.zeros_like(state), [], [], [], []
            for part in _parts(q, w):
                x, d = q[:, :, part], d_out[:, :, part]
                phi = ctx.maps.queries(x, w_1HMD)
                d_state += phi.mT @ d
                dq, dw = ctx.maps.pull(x, phi, d @ state.mT, w_1HMD, False)
                dqs.append(dq)
                dws.append(dw)
            for part in _parts(k, w):
                phi = _keys(ctx.maps, k, w_1HMD, level, part)
                dk, dw = ctx.maps.pull(k[:, :, part], phi, v[:, :, part] @ d_state.mT, w_1HMD, True)
                dks.append(dk)
                dvs.append(phi @ d_state)
                dws.append(dw)
        dw = None if dws[0] is None else sum(dws)[0]
        return None, *(torch.cat(x, 2) for x in (dqs, dks, dvs)), dw, None


def _parts(x, w):
    """Segments of a sequence [B, H, S, D]."""
    width = x.shape[-1] if w is None else w.shape[1]
    return segments(x.shape[2], x.shape[0] * x.shape[1] * width, x.device)


def _keys(maps, k, w, level, part):
    return maps.keys(k[:, :, part], w, None if level is None else level[:, :, part, None])


def over_documents(q_BHQD, k_BHSD, v_BHSD, documents, key_documents, peak_BHS):
    """Keys and queries of two sequences put into one, of each document its keys and then its queries.

    A causal scan of it gives each query all keys of its document, and no state of a document need be kept until its
    queries are found.

    Returns:
        queries, keys and values of Q + S places, 0 where a place is none of them; their documents; the places of the
        queries, [B, Q]; and peaks of keys, far below all others where there is no key.
    """
    keys, queries = k_BHSD.shape[2], q_BHQD.shape[2]
    documents = torch.cat([key_documents, documents], 1)
    order = documents.argsort(dim=1, stable=True)
    at = order[:, None, :, None]
    q = F.pad(q_BHQD, (0, 0, keys, 0)).take_along_dim(at, 2)
    k, v = (F.pad(x, (0, 0, 0, queries)).take_along_dim(at, 2) for x in (k_BHSD, v_BHSD))
    if peak_BHS is not None:
        lowest = torch.finfo(peak_BHS.dtype).min / 4
        peak_BHS = F.pad(peak_BHS, (0, queries), value=lowest).take_along_dim(at[..., 0], 2)
    return q, k, v, documents.take_along_dim(order, 1), order.argsort(dim=1)[:, keys:], peak_BHS
