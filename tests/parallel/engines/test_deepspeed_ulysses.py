"""DeepSpeed's exchange of heads for columns does what ours does, with fewer heads of keys than of queries too."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention

from headway.parallel.context import layout, ulysses
from headway.parallel.context.exchange import Team
from headway.parallel.engines.deepspeed.start import load


def both(rank, world, heads, keys, length):
    """Outputs and gradients of both exchanges on this rank's columns."""
    load("cpu").init_distributed(dist_init_required=False, verbose=False)
    from headway.parallel.engines.deepspeed.ulysses import traded

    generator = torch.Generator().manual_seed(0)
    whole = [
        torch.randn(2, n, length, 6, generator=generator, dtype=torch.float64) for n in (heads, keys, keys)
    ]
    team = Team(dist.group.WORLD, world, rank)
    here = layout.places(length, world, rank)
    found = []
    for exchange in (ulysses.traded, traded):
        mine = [x[:, :, here].clone().requires_grad_() for x in whole]
        out = exchange(*mine, (length, length), team, _causal)
        out.square().sum().backward()
        found.append([x.detach().numpy() for x in (out, *(x.grad for x in mine))])
    return found


def _causal(q, k, v):
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize(("ranks", "heads", "keys"), [(2, 4, 4), (2, 6, 2), (4, 8, 4)])
def test_the_exchange_is_ours_to_the_bit(pool, ranks, heads, keys):
    for ours, theirs in pool(both, ranks=ranks, heads=heads, keys=keys, length=16):
        for mine, other in zip(ours, theirs, strict=True):
            assert (mine == other).all()
