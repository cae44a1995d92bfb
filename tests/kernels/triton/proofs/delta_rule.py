"""The gated delta rule, beside the recurrence token by token in fp64."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.attention.masks import Mask
from headway.kernels.triton.delta_rule import delta_rule
from headway.kernels.triton.state_tiles import chunk_size
from headway.kernels.triton.workloads import delta_rule as workload
from headway.tests.kernels.triton.launches import Launch
from headway.tests.kernels.triton.proof import Case, Cost, Result, once, seed
from headway.tests.kernels.triton.proofs.linear_attention import documents_of
from headway.tests.kernels.triton.roundings import Roundings, bounds


def _case(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, documents: bool = False, kind: str = "drawn"
) -> Case:
    """`shape`: B, H, S, D of keys, D of values. `kind`: "forgetting", some tokens all, others nothing; "alike", keys
    that hardly differ and are corrected in full."""
    batch, heads, length, keys, values = shape

    def compute(device: torch.device) -> Mapping[str, Result]:
        draw = torch.Generator().manual_seed(seed())

        def normal(*size: int) -> Tensor:  # heads after tokens, as projections have them
            return torch.randn(batch, length, heads, *size, generator=draw).transpose(1, 2)

        q, k = F.normalize(normal(keys), dim=-1), normal(keys).contiguous()
        v, d, beta, log = normal(values), normal(values), normal().sigmoid(), -F.softplus(normal())
        if kind == "alike":
            k, beta = k * 0.05 + 1, 1 - beta * 0.01
        if kind == "forgetting":
            which = torch.rand(batch, heads, length, generator=draw)
            log = log.masked_fill(which < 0.05, -1e4).masked_fill(which > 0.6, 0.0)
        q, k, v, d = (x.to(dtype) for x in (q, F.normalize(k, dim=-1), v, d))
        mask = Mask(documents=documents_of(batch, length, draw) if documents else None)
        here = mask._replace(documents=None if mask.documents is None else mask.documents.to(device))
        given = q, k, v, beta, log
        ours = [x.clone().to(device).requires_grad_() for x in given]
        out = delta_rule(*ours[:3], here, beta_BHS=ours[3], log_decay_BHS=ours[4])
        found = [out, *torch.autograd.grad(out, ours, d.to(device))]
        wanted = _recurrence(None, mask, *given, d)
        far = bounds(
            lambda moved, x: _recurrence(moved, mask, *x),
            (*given, d),
            dtype,
            max(chunk_size(dtype), keys, values),
            draw,
        )
        names = "out", "dq", "dk", "dv", "d_beta", "d_log_decay"
        return {name: Result(*row) for name, *row in zip(names, found, wanted, far, strict=True)}

    return compute


def _recurrence(moved: Roundings | None, mask: Mask, *given: Tensor) -> list[Tensor]:
    """Output and gradients, in fp64, of q, k, v, b, logarithms of a, and the gradient of the output.

    With roundings of what kernels round, and of its gradients: what tokens find and write, states, and results."""
    *wide, d = (x.detach().double().requires_grad_() for x in given)
    q, k, v, b, log = wide
    moved = moved or (lambda x: x)
    state = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=torch.float64)
    outs = []
    for t in range(q.shape[2]):
        if t and mask.documents is not None:
            begins = mask.documents[:, t] != mask.documents[:, t - 1]
            state = state.masked_fill(begins[:, None, None, None], 0)
        state = state * log[:, :, t, None, None].exp()
        key = k[:, :, t, :, None]
        read = moved(state)
        written = moved(b[:, :, t, None] * moved(v[:, :, t] - (key * read).sum(-2)))
        state = state + key * written[:, :, None]
        outs.append(moved((q[:, :, t, :, None] * moved(state)).sum(-2)))
    out = torch.stack(outs, 2)
    found = torch.autograd.grad(out, wide, d.detach())
    return [out.detach(), *map(moved, found[:3]), *found[3:]]


_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
OFTEN = ("fp32, alike", "forgetting")
CASES: dict[str, Case] = (
    {"bf16, documents": _case((1, 1, 70, 24, 40), torch.bfloat16, True)}
    | {
        f"{name}, {keys} and {values} wide": _case(
            (1, heads, 70, keys, values), dtype, dtype == torch.float32
        )
        for dtype, name in _NAMES.items()
        for heads, keys, values in ((2, 40, 40), (2, 64, 80), (2, 80, 64), (1, 128, 128), (1, 256, 40))
    }
    | {f"{name}, one row": _case((1, 1, 1, 64, 64), dtype) for dtype, name in _NAMES.items()}
    | {f"{name}, a chunk": _case((1, 1, chunk_size(dtype), 16, 16), dtype) for dtype, name in _NAMES.items()}
    | {f"{name}, three chunks": _case((2, 1, 150, 16, 16), dtype) for dtype, name in _NAMES.items()}
    | {f"{name}, alike": _case((1, 1, 100, 32, 32), dtype, False, "alike") for dtype, name in _NAMES.items()}
    | {"forgetting": _case((1, 2, 100, 32, 32), torch.float32, True, "forgetting")}
)


META = torch.device("meta")
COMPILED = {
    "fp32": lambda: workload.call(META, 4, 1024, 64, True, torch.float32),
    "fp32, 256 wide": lambda: workload.call(META, 4, 1024, 256, True, torch.float32),
    "bf16, 256 wide, documents": lambda: workload.call(META, 4, 1024, 256, True),
} | {
    f"{name}, {width} wide, documents": partial(workload.call, META, 4, 1024, width, True, dtype)
    for dtype, name in _NAMES.items()
    for width in (32, 80, 128)
}


class _Line:
    """What formulas of costs are made of: lines, their tokens and chunks, bytes of a number, blocks, and bytes that
    edges and decays inside of chunks are made of in one line."""

    def __init__(self, launch: Launch) -> None:
        given = launch.arguments
        self.given, self.tokens, self.keys = given, given["length"], given["keys"]
        self.values, self.chunk = given.get("values", 0), given["C"]
        self.item = given["weights" if "weights" in given else "written"].element_size()
        self.lines = given["log"].shape[0] * given["log"].shape[1]
        self.chunks = -(-self.tokens // self.chunk)
        self.x = -(-self.keys // given["X"])
        self.z = -(-self.values // given["Z"]) if "Z" in given else 0
        documents = given["documents"] is not None
        self.edges = 4 * (self.tokens + documents * (2 * self.tokens + 4 * self.chunks))
        self.decays = 4 * self.tokens * (1 + documents)
        self.programs = launch.programs
        self.states = self.chunks * self.keys * self.values

    def cost(self, launch: Launch, read: int, written: int, products: int) -> Cost:
        """Of a line's bytes, and of FLOPs of a program's products / 2."""
        others = 4 * self.lines * self.tokens * (self.keys + self.values + self.chunk)
        return Cost(
            self.lines * read, self.lines * written, once(launch), 2 * self.programs * products, others
        )


def _systems(launch: Launch) -> Cost:
    at = _Line(launch)
    read = 2 * at.tokens * at.keys * at.item + at.decays + 4 * at.tokens
    c, x = at.chunk, at.x * at.given["X"]
    written = 2 * at.tokens * c * at.item
    return at.cost(launch, read, written, 2 * c * c * x + 2 * at.given["LEVELS"] * c**3)


def _states(launch: Launch) -> Cost:
    at = _Line(launch)
    read = at.z * (at.tokens * (at.keys + at.chunk) * at.item + at.edges + 4 * at.tokens)
    c, x, z = at.chunk, at.given["X"], at.given["Z"]
    read += at.tokens * at.values * at.item
    written = (at.states + at.tokens * at.values) * at.item
    return at.cost(launch, read, written, at.chunks * c * z * (2 * x + c))


def _outputs(launch: Launch) -> Cost:
    at = _Line(launch)
    read = at.z * (at.tokens * (at.keys + at.chunk) * at.item + at.edges)
    read += (at.states + at.tokens * at.values) * at.item
    c, x, z = at.chunk, at.x * at.given["X"], at.given["Z"]
    return at.cost(launch, read, at.tokens * at.values * at.item, c * z * (x + c))


def _back(launch: Launch) -> Cost:
    at = _Line(launch)
    read = at.z * (2 * at.tokens * (at.keys + at.chunk) * at.item + at.edges + 4 * at.tokens)
    c, x, z = at.chunk, at.given["X"], at.given["Z"]
    read += at.tokens * at.values * at.item
    written = (at.states + at.tokens * at.values) * at.item
    return at.cost(launch, read, written, at.chunks * c * z * (3 * x + 2 * c))


def _gradients(launch: Launch) -> Cost:
    at = _Line(launch)
    read = (
        (4 + 3 * at.x) * at.tokens * at.values
        + 3 * at.tokens * at.keys
        + at.tokens * at.chunk
        + 2 * at.states
    )
    read = read * at.item + at.edges + at.decays + 4 * at.tokens
    written = at.tokens * ((at.values + 2 * at.keys) * at.item + 8)
    c, x, z = at.chunk, at.x * at.given["X"], at.z * at.given["Z"]
    return at.cost(launch, read, written, 2 * c * c * z + 4 * c * c * x + 3 * c * x * z)


COSTS = {
    "delta_rule_systems_kernel": _systems,
    "delta_rule_states_kernel": _states,
    "delta_rule_outputs_kernel": _outputs,
    "delta_rule_back_kernel": _back,
    "delta_rule_gradients_kernel": _gradients,
}
