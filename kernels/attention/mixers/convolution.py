"""Causal convolutions over the sequence, every channel by itself: short ones, and ones as long as it.

Long (Poli et al. 2023, section 3.3): y_t = sum over s <= t of h_{t-s} u_s + skip u_t, by the discrete Fourier
transform in O(n log n); the reference is a Toeplitz matrix. The backward is two correlations of the same kind, and
saves u and h only, not their spectra.

Shapes: B batch, C channels, S sequence, T taps of a short filter.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(u_BCS: Tensor, h_CS: Tensor, skip_C: Tensor) -> Tensor:
    """The specification, O(S^2): a Toeplitz matrix for every channel; returns [B, C, S]."""
    length = u_BCS.shape[-1]
    place = torch.arange(length, device=u_BCS.device)
    ago_SS = place[:, None] - place
    toeplitz_CSS = torch.where(ago_SS >= 0, h_CS[:, ago_SS.clamp(min=0)], 0)
    return torch.einsum("cst,bct->bcs", toeplitz_CSS, u_BCS) + skip_C[:, None] * u_BCS


def long(u_BCS: Tensor, h_CS: Tensor, skip_C: Tensor) -> Tensor:
    """As `reference`, by transforms of at least 2 S - 1 places, so that nothing wraps around.

    Computed in fp32 or wider, for Fourier transforms of bf16 are not to be had; returns u's dtype.

    Args:
        u_BCS: the inputs.
        h_CS: a filter as long as the sequence for every channel.
        skip_C: factor of the input that is added.
    """
    wide = torch.promote_types(u_BCS.dtype, torch.float32)
    with torch.autocast(u_BCS.device.type, enabled=False):
        u = u_BCS.to(wide)
        out: Tensor = _Long.apply(u, h_CS.to(wide)) + skip_C.to(wide)[:, None] * u
    return out.to(u_BCS.dtype)


class _Long(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, h: Tensor) -> Tensor:
        ctx.save_for_backward(u, h)
        places = transform_length(u.shape[-1])
        return _back(torch.fft.rfft(u, places) * torch.fft.rfft(h, places), u.shape[-1], places)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor | None]:
        # du_s = sum over t >= s of h_{t-s} d_t, and dh_a = sum over rows and s of u_s d_{s+a}: correlations, whose
        # spectra have a conjugate.
        u, h = ctx.saved_tensors
        length, places = u.shape[-1], transform_length(u.shape[-1])
        d_spectrum = torch.fft.rfft(d_out, places)
        du = dh = None
        if ctx.needs_input_grad[0]:
            du = _back(d_spectrum * torch.fft.rfft(h, places).conj(), length, places)
        if ctx.needs_input_grad[1]:
            dh = _back((d_spectrum * torch.fft.rfft(u, places).conj()).sum(0), length, places)
        return du, dh


def _back(spectrum: Tensor, length: int, places: int) -> Tensor:
    return torch.fft.irfft(spectrum, places)[..., :length].contiguous()


def transform_length(length: int) -> int:
    """The least 2^a, 3 2^a or 5 2^a that holds a convolution of two such sequences."""
    least = max(1, 2 * length - 1)
    candidates = (odd << max(0, (-(-least // odd) - 1).bit_length()) for odd in (1, 3, 5))
    return min(candidates)


def flops(channels: int, length: int) -> float:
    """Forward FLOPs of `long` on one row, without the filter's own transform: two real transforms of N places at
    2.5 N log2 N (half of a complex one's 5 N log2 N), and a product of N / 2 complex numbers."""
    places = transform_length(length)
    return channels * (5 * places * math.log2(places) + 3 * places)


def short(u_BSC: Tensor, taps_CT: Tensor) -> Tensor:
    """y_t = sum over a < T of taps_a u_{t-a}, every channel by itself; what is before the first place is 0.

    Tap 0 is of the place itself: `torch.nn.Conv1d` holds the taps the other way round.

    Args:
        u_BSC: channels last, as projections give them.
        taps_CT: a filter for every channel.
    """
    taps, length = taps_CT.shape[1], u_BSC.shape[1]
    padded = F.pad(u_BSC, (0, 0, taps - 1, 0))
    out = taps_CT[:, 0] * u_BSC
    for a in range(1, taps):
        out = out + taps_CT[:, a] * padded[:, taps - 1 - a : taps - 1 - a + length]
    return out
