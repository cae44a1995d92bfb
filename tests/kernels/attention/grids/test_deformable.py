"""Deformable attention against transformers' port of the authors' code, and the fast path against the reference."""

import pytest
import torch

from headway.kernels.attention.grids import deformable


def inputs(sides=((6, 6), (3, 3)), queries=5, dtype=torch.float64):
    """Levels [2, 3, 4, R, C], places (some outside), weights that sum to 1; 3 heads, 2 points."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    levels = [normal(2, 3, 4, *side).to(dtype).requires_grad_() for side in sides]
    places = (0.5 + 0.4 * normal(2, queries, 3, len(sides), 2, 2)).requires_grad_()
    weights = torch.softmax(normal(2, queries, 3, len(sides) * 2), -1).unflatten(-1, (len(sides), 2))
    return levels, places, weights.detach().requires_grad_()


def value_and_gradients(compute, levels, places, weights):
    out = compute(levels, places, weights)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return out, *torch.autograd.grad(out, [*levels, places, weights], upstream.to(out.dtype))


def theirs(levels, places, weights):
    """Values of all levels in a row, heads after places; output [B, Q, H D]."""
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

    value = torch.cat([v.flatten(3).permute(0, 3, 1, 2) for v in levels], 1)
    shapes = [tuple(v.shape[-2:]) for v in levels]
    out = MultiScaleDeformableAttention()(value, torch.tensor(shapes), shapes, None, places, weights, 64)
    return out.unflatten(2, (3, 4)).transpose(1, 2)


@pytest.mark.parametrize("compute", [deformable.reference, deformable.attention])
@pytest.mark.parametrize("sides", [((6, 6), (3, 3)), ((5, 7),), ((1, 1), (2, 3), (4, 4))])
def test_it_is_deformable_detrs(sides, compute):
    given = inputs(sides)
    # fp64; fractions of coordinates up to 10 keep 2^-49, and slopes are differences of values of order 1.
    torch.testing.assert_close(
        value_and_gradients(compute, *given), value_and_gradients(theirs, *given), rtol=1e-11, atol=1e-11
    )


def test_gradients():
    levels, places, weights = inputs(((3, 3), (2, 2)), queries=2)
    assert torch.autograd.gradcheck(
        lambda places, weights, *levels: deformable.attention(levels, places, weights),
        (places, weights, *levels),
    )


def test_bf16_values_are_read_between_exact_places():
    levels, places, weights = inputs(dtype=torch.bfloat16)
    got = deformable.attention(levels, places.float(), weights.float())
    want = deformable.attention([v.double() for v in levels], places, weights)
    assert got.dtype == torch.bfloat16
    assert (got.double() - want).norm() / want.norm() < 2**-8  # one rounding, of the output


def test_a_query_that_points_at_a_place_reads_it():
    value = torch.arange(12.0).view(1, 1, 1, 3, 4)
    xy = torch.tensor([(2 + 0.5) / 4, (1 + 0.5) / 3]).view(1, 1, 1, 1, 1, 2)
    for compute in (deformable.reference, deformable.attention):
        torch.testing.assert_close(compute([value], xy, torch.ones(1, 1, 1, 1, 1)).item(), 6.0)


def test_queries_begin_where_they_stand():
    stand = deformable.centres(3, 1, torch.device("cpu"))
    assert stand[:3].tolist() == [[0.5, 0.5], pytest.approx([1 / 6, 1 / 6]), pytest.approx([0.5, 1 / 6])]


def test_heads_look_round_about():
    """The authors' initial bias (Deformable-DETR, `MSDeformAttn._reset_parameters`), turned by 15 degrees, nearer."""
    ring = deformable.ring(8, 3, torch.device("cpu"))
    angles = torch.atan2(ring[..., 1], ring[..., 0]).rad2deg() % 360
    torch.testing.assert_close(angles, torch.arange(8.0)[:, None].expand(8, 3) * 45 + 15, rtol=0, atol=1e-3)
    far = ring.abs().amax(-1)
    torch.testing.assert_close(far, torch.arange(1.0, 4).expand(8, 3) / 2**0.5)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 12])
@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 8])
def test_no_query_begins_where_the_slope_jumps(side, heads):
    ring = deformable.ring(heads, 4, torch.device("cpu"), torch.float64)
    stand = deformable.centres(side, 1, torch.device("cpu"), torch.float64)
    for level in range(3):
        small = max(1, side >> level)
        places = stand[:, None, None] * small - 0.5 + ring
        assert (places - places.round()).abs().min() > 1e-4  # fp32 rounds by 1e-6


def test_levels_are_means():
    value = torch.randn(2, 3, 4, 6, 6)
    levels = deformable.pyramid(value, 5)
    assert [v.shape[-1] for v in levels] == [6, 3, 1, 1, 1]
    torch.testing.assert_close(levels[1][..., 1, 2], value[..., 2:4, 4:6].mean((-2, -1)))
    torch.testing.assert_close(levels[2][..., 0, 0], value.mean((-2, -1)))
