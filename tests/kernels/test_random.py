"""Random numbers by coordinates: against Random123's vectors, against SciPy-free truths, and slice by slice."""

import math

import numpy as np
import pytest
import torch

from headway.kernels import philox_host, random

# Known answers of Random123 1.14 (kat_vectors, "philox4x32 10"): counter, key, output.
VECTORS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def signed(low: int, high: int) -> int:
    return int(np.array(high << 32 | low, dtype=np.uint64).view(np.int64))


@pytest.fixture(params=["host", "torch"])
def way(request, monkeypatch):
    """Both ways to the words: numpy on the host, and torch, as on GPUs and compiled."""
    monkeypatch.setattr(random, "_on_host", lambda *values: request.param == "host")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_philox_gives_the_known_answers(counter, key, words):
    key = torch.tensor(signed(*key))
    assert [w.item() for w in random.philox(key, *map(torch.tensor, counter))] == words


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 13])
def test_the_host_has_the_bits_of_torch(monkeypatch, block):
    """However shapes are cut into blocks: keys by row, counters of several shapes, offsets, chances near 0 and 1."""
    monkeypatch.setattr(philox_host, "BLOCK", block)
    keys, slots = torch.tensor([[[random.key(1, "a")]], [[random.key(2)]]]), torch.arange(3)[:, None] * 2**31
    counters = torch.arange(5), slots, torch.tensor(7), 2**32 - 1
    cases = [(keys[:, 0, 0][0], p, (slots, torch.arange(4)[None], 3), 21, 5) for p in (0.0, 1e-6, 0.3, 1.0)]

    def all_of_it():
        return [*random.philox(keys, *counters), *(random.keep(*case) for case in cases)]

    found = all_of_it()
    monkeypatch.setattr(random, "_on_host", lambda *values: False)
    for ours, theirs in zip(found, all_of_it(), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("way")
def test_philox_agrees_with_numpy_on_many_counters():
    # numpy's Philox is the 64-bit variant: the oracle here is 32-bit arithmetic in uint64, written from the paper.
    rng = np.random.default_rng(0)
    counter = rng.integers(0, 2**32, (4, 1000), dtype=np.uint64)
    key = rng.integers(0, 2**32, 2, dtype=np.uint64)
    got = random.philox(
        torch.tensor(signed(int(key[0]), int(key[1]))),
        *(torch.from_numpy(c.astype(np.int64)) for c in counter),
    )
    x, k, mask = list(counter), list(key), np.uint64(2**32 - 1)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * x[0], np.uint64(0xCD9E8D57) * x[2]
        x = [(p1 >> np.uint64(32)) ^ x[1] ^ k[0], p1 & mask, (p0 >> np.uint64(32)) ^ x[3] ^ k[1], p0 & mask]
        k = [(k[0] + np.uint64(0x9E3779B9)) & mask, (k[1] + np.uint64(0xBB67AE85)) & mask]
    for ours, theirs in zip(got, x, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.astype(np.int64))


def test_a_compiled_mask_is_the_eager_mask():
    def mask(key, slots):
        places, heads = torch.arange(20), torch.arange(3) + 5
        hidden = random.keep(key, 0.3, (slots[:, None], places[None], 0), 43)
        weights = random.keep(
            key, 0.3, (slots[:, None, None], heads[None, :, None], places[None, None]), 24, 8
        )
        return hidden, weights

    key, slots = torch.tensor(random.key(3, "x")), torch.arange(4) + 1000
    for eager, compiled in zip(
        mask(key, slots), torch.compile(mask, fullgraph=True)(key, slots), strict=True
    ):
        assert torch.equal(eager, compiled)


def test_keys_are_stable_and_told_apart():
    # A changed key would silently change every run: this number is part of the format.
    assert random.key(0, "init", "model.embed.tokens.weight") == -2462039691972720933
    assert len({random.key(0, "ab", "c"), random.key(0, "a", "bc"), random.key(1, "ab", "c")}) == 3


def test_normal_is_normal():
    x = random.normal(random.key(0, "w"), torch.arange(1000), 0, 1000).double().flatten()
    n = x.numel()
    # Sample moments of a normal: deviations of mean, variance, fourth moment are 1, sqrt 2, sqrt 96 over sqrt n.
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / n)
    neighbours = (x[:-1] * x[1:]).mean()
    assert abs(neighbours) < 5 / math.sqrt(n)


def test_quantile_matches_torch():
    u = torch.cat(
        [torch.linspace(1e-9, 1 - 1e-9, 100_001, dtype=torch.float64), torch.tensor([2.0**-33]).double()]
    )
    ours, theirs = random._normal_quantile(u), torch.special.ndtri(u)
    torch.testing.assert_close(ours, theirs, rtol=2e-9, atol=2e-9)  # 1.15e-9 is the approximation's own error


@pytest.mark.parametrize(("rows", "columns"), [((0, 7), (0, 13)), ((3, 4), (5, 6)), ((2, 7), (1, 12))])
def test_slices_have_the_bits_of_the_whole(rows, columns):
    key = random.key(1, "w")
    whole = random.normal(key, torch.arange(7), 0, 13)
    part = random.normal(key, torch.arange(*rows), *columns)
    assert torch.equal(part, whole[slice(*rows), slice(*columns)])
    mask = random.keep(torch.tensor(key), 0.5, (torch.arange(7), 0, 0), 13)
    part = random.keep(torch.tensor(key), 0.5, (torch.arange(*rows), 0, 0), columns[1], columns[0])
    assert torch.equal(part, mask[slice(*rows), slice(*columns)])
