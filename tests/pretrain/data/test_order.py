"""The order of samples: bijective, well mixed, the same for ever, and blended without loss."""

import hashlib
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.pretrain.data.order import Blend, Permutation, make_key


def chi_square(counts: np.ndarray, expected: float) -> float:
    """Standard score of the chi-square statistic: normal with mean 0 and deviation 1 for many cells."""
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


@given(size=st.integers(1, 20_000), key=st.integers(0, 2**128 - 1))
@settings(max_examples=100, deadline=None)
def test_a_permutation_is_a_bijection_and_inverts(size, key):
    permutation = Permutation(size, key)
    image = permutation(np.arange(size))
    assert np.array_equal(np.sort(image), np.arange(size))
    assert np.array_equal(permutation.inverse(image), np.arange(size))


@pytest.mark.parametrize("size", range(1, 70))
def test_every_small_size_is_a_bijection(size):
    assert sorted(Permutation(size, make_key("small", size))(np.arange(size))) == list(range(size))


@given(size=st.integers(10**9, 2**62), key=st.integers(0, 2**128 - 1), data=st.data())
@settings(max_examples=50, deadline=None)
def test_sizes_beyond_memory_invert(size, key, data):
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), max_size=20, unique=True)), dtype=np.int64)
    permutation = Permutation(size, key)
    image = permutation(index)
    assert np.unique(image).size == index.size
    assert image.size == 0 or (image.min() >= 0 and image.max() < size)
    assert np.array_equal(permutation.inverse(image), index)


def test_the_order_is_the_same_on_every_platform_and_release():
    """A change of these numbers reorders every running job's data: never change them."""
    assert make_key(0, "corpus.jsonl", 0) == 236739103835040847864569623454858530608
    assert Permutation(10, make_key(1, "a", 0))(np.arange(10)).tolist() == [0, 6, 9, 7, 5, 4, 2, 1, 3, 8]
    assert Permutation(10**12, make_key(1, "a", 0))([0, 1, 10**12 - 1]).tolist() == [
        370481875511,
        927197402728,
        505838443929,
    ]


def plain_permutation(size: int, key: int, index: int) -> int:
    """The definition in Python's integers, one index at a time."""
    digest = hashlib.blake2b(key.to_bytes(16, "little"), digest_size=64, person=b"headway.order").digest()
    keys = [int.from_bytes(digest[i : i + 8], "little") for i in range(0, 64, 8)]
    side = next(a for a in itertools.count(math.isqrt(size)) if a * a >= size)
    while True:
        left, right = divmod(index, side)
        for k in keys:
            x = (right + k) % 2**64
            x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
            left, right = right, (left + (x ^ (x >> 31))) % side
        index = left * side + right
        if index < size:
            return index


@pytest.mark.parametrize("size", [1, 2, 7, 1000, 10**12, 2**62 - 1, 2**62])
def test_the_permutation_is_the_one_that_is_defined(size):
    index = np.unique(np.linspace(0, size - 1, 20, dtype=np.int64).clip(0, size - 1))
    key = make_key("definition", size)
    assert Permutation(size, key)(index).tolist() == [plain_permutation(size, key, i) for i in index.tolist()]


def test_shapes_and_empty_index():
    permutation = Permutation(100, 7)
    assert permutation(np.arange(6).reshape(2, 3)).shape == (2, 3)
    assert permutation(5).shape == ()
    assert permutation(np.array([], dtype=np.int64)).shape == (0,)


@pytest.mark.parametrize(("size", "key"), [(0, 0), (2**62 + 1, 0), (5, -1), (5, 2**128)])
def test_sizes_and_keys_out_of_range_are_refused(size, key):
    with pytest.raises(ValueError, match="permutation"):
        Permutation(size, key)


@pytest.mark.parametrize("index", [-1, 10])
def test_indices_out_of_range_are_refused(index):
    with pytest.raises(ValueError, match="range"):
        Permutation(10, 0)(index)


# The statistics below are fixed by their keys, so these tests either always pass or never. A bound of 4
# standard deviations would fail one true shuffle in 16,000.


@pytest.mark.parametrize("size", [2, 3, 5, 16, 33])
def test_each_element_lands_anywhere_equally_often(size):
    keys = 2000
    images = np.stack([Permutation(size, make_key("cells", k))(np.arange(size)) for k in range(keys)])
    for element in range(min(size, 6)):
        counts = np.bincount(images[:, element], minlength=size)
        assert chi_square(counts, keys / size) < 4


def test_all_orders_of_four_are_equally_frequent():
    keys = 2400
    images = [tuple(Permutation(4, make_key("orders", k))(np.arange(4)).tolist()) for k in range(keys)]
    _, counts = np.unique(np.array(images), axis=0, return_counts=True)
    assert counts.size == 24
    assert chi_square(counts, keys / 24) < 4


@pytest.mark.parametrize("size", [1000, 65_536, 10**6, 10**12])
def test_positions_and_neighbours_show_no_pattern(size):
    n = min(size, 50_000)
    image = Permutation(size, make_key("pattern", size))(np.arange(n))
    x = image / size
    # Positions of consecutive draws, and steps between them, over a grid: a sequential or strided order
    # would fill few cells. Without replacement the counts vary less than chi-square, never more.
    pairs = (x[:-1] * 16).astype(int) * 16 + (x[1:] * 16).astype(int)
    assert chi_square(np.bincount(pairs, minlength=256), (n - 1) / 256) < 4
    steps = ((x[1:] - x[:-1]) % 1 * 64).astype(int)
    assert chi_square(np.bincount(steps, minlength=64), (n - 1) / 64) < 4
    for lag in (1, 2, 3, 64, 1000 - 1):
        if n - lag > 100:
            assert abs(np.corrcoef(x[:-lag], x[lag:])[0, 1]) < 4 / np.sqrt(n - lag)
    assert abs(np.corrcoef(np.arange(n), x)[0, 1]) < 4 / np.sqrt(n)


@pytest.mark.parametrize("other", [make_key(1, "a", 0), make_key(0, "a", 1), make_key(0, "b", 0)])
def test_seed_source_and_epoch_give_independent_orders(other):
    size = 100_000
    one = Permutation(size, make_key(0, "a", 0))(np.arange(size))
    two = Permutation(size, other)(np.arange(size))
    assert abs(np.corrcoef(one, two)[0, 1]) < 4 / np.sqrt(size)
    assert (one == two).sum() < 1 + 4  # Poisson with mean 1


def test_neighbouring_keys_are_independent():
    size = 10_000
    images = np.stack([Permutation(size, key)(np.arange(size)) for key in range(20)])
    correlation = np.corrcoef(images) - np.eye(20)
    assert np.abs(correlation).max() < 4.5 / np.sqrt(size)  # the largest of 190


weights = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9)


@given(weights=weights, n=st.integers(0, 3000))
@settings(max_examples=100, deadline=None)
def test_a_blend_consumes_every_source_in_order_and_by_share(weights, n):
    blend = Blend(weights)
    source, index = blend.place(np.arange(n))
    for s, weight in enumerate(weights):
        mine = index[source == s]
        assert np.array_equal(mine, np.arange(mine.size))
        # Half a draw for each level of the tree, and shares rounded to 2^-32.
        levels = np.ceil(np.log2(len(weights)))
        assert abs(mine.size - n * weight / sum(weights)) <= levels / 2 + 1e-6
        assert blend.counts(n)[s] == mine.size


def test_a_single_source_is_the_identity():
    source, index = Blend([3.0]).place([0, 5, 10**15])
    assert source.tolist() == [0, 0, 0]
    assert index.tolist() == [0, 5, 10**15]


def test_a_blend_far_into_a_run_agrees_with_python_integers():
    blend, draw = Blend([0.7, 0.3]), 10**18
    share = round(0.7 * 2**32)
    assert blend.counts(draw) == (n := (draw * share + 2**31) >> 32, draw - n)
    source, index = blend.place(np.arange(draw, draw + 100))
    assert index[source == 0][0] == n
    assert np.bincount(source).tolist() in ([70, 30], [69, 31], [71, 29])


def test_any_window_holds_the_proportions():
    source, _ = Blend([0.5, 0.3, 0.2]).place(np.arange(100_000))
    for s, share in enumerate((0.5, 0.3, 0.2)):
        window = np.convolve(source == s, np.ones(32), mode="valid")
        assert np.abs(window - 32 * share).max() <= 2


@given(first=weights, data=st.data(), n=st.integers(0, 500), m=st.integers(0, 500))
@settings(max_examples=100, deadline=None)
def test_changing_the_weights_loses_and_repeats_nothing(first, data, n, m):
    second = data.draw(st.lists(st.floats(1e-3, 1e3), min_size=len(first), max_size=len(first)))
    before = Blend(first)
    after = before.reweighted(n, second)
    third = after.reweighted(n + m, first)
    parts = [
        before.place(np.arange(n)),
        after.place(np.arange(n, n + m)),
        third.place(np.arange(n + m, n + 2 * m)),
    ]
    source, index = (np.concatenate(x) for x in zip(*parts, strict=True))
    for s in range(len(first)):
        assert np.array_equal(index[source == s], np.arange((source == s).sum()))
    restored = Blend(third.weights, third.start, third.consumed)  # its whole state
    assert all(
        np.array_equal(a, b)
        for a, b in zip(restored.place(np.arange(n + m, n + 2 * m)), parts[2], strict=True)
    )


@pytest.mark.parametrize("weights", [[], [0.0], [1.0, -1.0], [float("nan")], [float("inf"), 1.0]])
def test_weights_that_mean_nothing_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        Blend(weights)


def test_draws_before_the_blend_are_refused():
    blend = Blend([1.0, 1.0], start=10, consumed=(4, 6))
    with pytest.raises(ValueError, match="draw 9"):
        blend.place([9])
    with pytest.raises(ValueError, match="draw 9"):
        blend.counts(9)
    with pytest.raises(ValueError, match="do not fit"):
        Blend([1.0, 1.0], start=10, consumed=(4,))
