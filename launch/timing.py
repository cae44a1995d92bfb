"""Time and peak memory of attention layers, forward and backward, one mechanism after the other.

A layer is what a block has: projections, the mechanism, the output's projection; 8 heads of 64, one row.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headway.kernels.attention.masks import Mask
from headway.kernels.attention.registry import mechanism
from headway.pretrain import config
from headway.pretrain.models.init import initialise
from headway.pretrain.models.mixers import build_mixer
from headway.pretrain.models.seat import Seat

HEADS, DIM = 8, 64
ROUNDS = 5
STATUS = Path("/proc/self/status")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(
    names: Sequence[str],
    lengths: Sequence[int],
    *,
    limit: float,
    dtype: str,
    threads: int | None,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Points: mechanism, tokens, seconds of forward, backward and both (medians), peak bytes beside the inputs."""
    if threads:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in names:
        last: tuple[int, float] | None = None
        for tokens in lengths:
            if last and last[1] * (tokens / last[0]) ** 2 > limit:
                break
            say(f"{name} at {tokens}")
            tokens = _grid(tokens) if "images" in mechanism(name).supports else tokens
            point = _measure(name, tokens, DTYPES[dtype], device, limit)
            last = tokens, point["seconds"]
            yield point


def layer_of(name: str, tokens: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A layer with the mechanism at its own settings, with initial weights."""
    row = mechanism(name)
    family = "vit" if "images" in row.supports else "gpt" if "causal" in row.supports else "bert"
    model = config.Model(
        family=family,  # type: ignore[arg-type]
        hidden=HEADS * DIM,
        heads=HEADS,
        attention=config.Attention(mechanism=name),
        vision=config.Vision(class_token=False),
    )
    layer = build_mixer(model, Seat(0, "causal" in row.supports, tokens=tokens)).to(device, dtype)
    initialise(layer, model, seed=0)
    return layer


def _grid(tokens: int) -> int:
    """The square of patches that is next in size."""
    return round(tokens**0.5) ** 2


def _measure(
    name: str, tokens: int, dtype: torch.dtype, device: torch.device, limit: float
) -> dict[str, Any]:
    layer = layer_of(name, tokens, dtype, device)
    mask = Mask("causal" in mechanism(name).supports)
    x = torch.randn(1, tokens, HEADS * DIM, device=device, dtype=dtype)
    times: list[tuple[float, float]] = []
    peak, held = 0, begin(device)
    rounds = 0
    while rounds <= ROUNDS and (rounds < 2 or sum(map(sum, times)) < limit):
        times.append(_once(layer, x, mask, device))
        if rounds == 0:
            peak = peak_since(device) - held
            times.clear()  # the first call warms up
        rounds += 1
    forward, backward = (statistics.median(part) for part in zip(*times, strict=True))
    return {
        "mechanism": name, "tokens": tokens, "forward": forward, "backward": backward,
        "seconds": statistics.median(map(sum, times)), "peak": max(0, peak),
    }  # fmt: skip


def _once(layer: nn.Module, x: Tensor, mask: Mask, device: torch.device) -> tuple[float, float]:
    """Seconds of a forward and a backward."""
    x = x.detach().requires_grad_()
    layer.zero_grad(set_to_none=True)
    start = _now(device)
    y = layer(x, mask)[0]
    middle = _now(device)
    y.backward(torch.ones_like(y))
    return middle - start, _now(device) - middle


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def begin(device: torch.device) -> int:
    """Bytes that are held now; peaks count from here on."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if not STATUS.exists():
        return 0
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, so that it counts when it is taken again
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_since(device: torch.device) -> int:
    """Bytes at the peak since `begin`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") if STATUS.exists() else 0


def _status(name: str) -> int:
    return next(int(line.split()[1]) << 10 for line in STATUS.read_text().splitlines() if name in line)


def draw(points: Sequence[dict[str, Any]], path: Path) -> Path:
    """Seconds and peak memory against tokens, log-log, a line for every mechanism."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 9), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(p["mechanism"] for p in points))
    panels = figure.subplots(1, 2)
    for panel, key, title, unit in zip(
        panels,
        ("seconds", "peak"),
        ("forward and backward, seconds", "peak memory, MiB"),
        (1, 2**20),
        strict=True,
    ):
        for i, name in enumerate(names):
            mine = [p for p in points if p["mechanism"] == name]
            style = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":", "-.")[i // 10 % 4], "marker": "."}
            panel.loglog(
                [p["tokens"] for p in mine], [max(p[key], 1e-9) / unit for p in mine], label=name, **style
            )
        panel.set_xlabel("tokens")
        panel.set_title(title)
        panel.grid(visible=True, which="both", alpha=0.2)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=100)
    return path
