"""The C++ kernel for CPUs: its tiles, what it is an operator of, and what only it promises; that it computes the
reference is tested where all kernels are."""

import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from headway.kernels import random
from headway.kernels.attention import choose as choice
from headway.kernels.attention import cpp
from headway.kernels.attention.choose import KernelUnavailable, choose
from headway.kernels.attention.dense import WeightDropout, reference
from headway.kernels.attention.masks import Mask, lower
from headway.kernels.attention.registry import mechanism
from headway.kernels.attention.scopes import BigBird, Ends, Global, Local, OtherBlocks, Window
from headway.kernels.attention.slopes import Slopes, geometric
from headway.kernels.attention.tiles import block_mask

from .test_kernels import DOCUMENTS, MASKS, heads, inputs_of, value_and_gradients

pytestmark = pytest.mark.skipif(cpp.unavailable() is not None, reason="no C++ kernels here")

SCOPES = {
    "all": None,
    "window": Window(40),
    "itself": Window(1),
    "local": Local(24, 1),
    "longformer": Global(20, 5, True),
    "streaming": Global(20, 5, False),
    "bigbird": BigBird(16, 1, 2, 5),
}


@pytest.mark.parametrize("length", [1, 15, 128, 129, 303])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scope", SCOPES)
def test_tiles_hold_what_is_seen(scope, causal, length):
    tiles = block_mask(causal, SCOPES[scope], length, length)
    found = torch.zeros(length, length, dtype=torch.bool)
    rows, width = tiles.tile
    for i in range(len(tiles.starts) - 1):
        for at in range(tiles.starts[i], tiles.starts[i + 1]):
            block = found[
                i * rows : (i + 1) * rows, tiles.columns[at] * width : (tiles.columns[at] + 1) * width
            ]
            assert not block.any()
            kind = int(tiles.kinds[at])
            seen = torch.ones(width, rows, dtype=torch.bool) if kind < 0 else tiles.patterns[kind]
            assert seen.any()
            block |= seen.T[: block.shape[0], : block.shape[1]]
    expected = lower(Mask(causal, scope=SCOPES[scope]), length, length, torch.device("cpu"))
    expected = torch.ones(1, 1, length, length, dtype=torch.bool) if expected is None else expected
    assert torch.equal(found, expected[0, 0])


def test_tiles_in_which_nothing_is_seen_are_left_out():
    tiles = block_mask(True, Window(256), 8192, 8192)
    assert len(tiles.columns) <= 64 * 3
    assert len(tiles.patterns) == 2  # the diagonal, and the far edge of the window
    dense = block_mask(True, None, 8192, 8192)
    assert len(dense.columns) == 64 * 65 // 2
    assert len(dense.patterns) == 1


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [16, 61, 64])
def test_keys_that_stand_for_blocks_are_those_that_are_seen(length, causal):
    """Fixed attention's second phase, of all keys and of the picked ones."""
    whole, place = Ends(8, 2), torch.arange(length)
    places, picked = whole.places(length), OtherBlocks(8, 2, causal)
    seen = whole.sees(place[:, None], place[None], length, causal)
    seen = seen.tril() if causal else seen
    numbers = torch.arange(len(places))
    found = picked.sees(place[:, None], numbers[None], len(places), False)
    assert torch.equal(found, seen[:, places])
    assert seen.sum() == found.sum()
    for start in range(0, length, 5):
        queries = range(start, min(length, start + 5))
        (run,) = picked.ranges(queries, len(places), False)
        outside = [n for n in range(len(places)) if n not in run]
        assert not found[list(queries)][:, outside].any()


def test_the_operator_is_a_proper_one():
    q, k, v = heads(length=40, dtype=torch.float32)
    places = torch.arange(40)
    drop = WeightDropout(0.25, torch.tensor(5), torch.arange(2), places)
    slopes = Slopes(torch.tensor(geometric(6)), places, places)
    sink, bias = torch.randn(6, requires_grad=True), torch.randn(6, 40, 40, requires_grad=True)
    for mask in (Mask(), Mask(False, DOCUMENTS[:, :40].contiguous())):
        for options in ((None, None, None), (drop, slopes, 2.0)):
            what = cpp.described(q, mask, options[0], None, options[1], options[2])
            torch.library.opcheck(torch.ops.headway.attention_cpp, (q, k, v, sink, bias, *what))


@pytest.mark.parametrize("mask", ["causal", "padded prefix", "cross padded", "window"])
def test_it_compiles_without_a_break(mask):
    torch.compiler.reset()
    inputs = inputs_of(mask, False, torch.float32)
    compiled = torch.compile(cpp.attention, fullgraph=True, backend="aot_eager")
    ours, theirs = (value_and_gradients(f, inputs, MASKS[mask]) for f in (compiled, cpp.attention))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_it_is_computed_again():
    inputs = heads(dtype=torch.float32)
    again = partial(checkpoint, cpp.attention, use_reentrant=False)
    ours, theirs = (value_and_gradients(f, inputs, Mask()) for f in (again, cpp.attention))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bits_depend_neither_on_threads_nor_on_other_heads(dtype):
    inputs = heads(6, 6, dtype=dtype)
    drop = WeightDropout(0.25, torch.tensor(random.key(0, "x")), torch.tensor([7, 3]), torch.arange(303))
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(value_and_gradients(cpp.attention, inputs, Mask(), drop))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    upper = [x.detach()[:, 3:].requires_grad_() for x in inputs]
    out = cpp.attention(*upper, Mask(), drop._replace(first_head=3))
    assert torch.equal(out, found[0][0][:, 3:])


@pytest.mark.parametrize("dim", [1, 7, 20, 64, 80])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_width_of_heads_and_values(dim, dtype):
    generator = torch.Generator().manual_seed(1)
    shapes = (2, 4, 61, dim), (2, 2, 61, dim), (2, 2, 61, 2 * dim + 1)
    inputs = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]
    exact = value_and_gradients(reference, [x.detach().double().requires_grad_() for x in inputs], Mask())
    for ours, theirs in zip(value_and_gradients(cpp.attention, inputs, Mask()), exact, strict=True):
        # Three roundings of 2^-9 in a chain, as in `test_bf16_is_as_good_as_bf16_can_be`; fp32: of 2^-24, in sums.
        bound = 3 * 2**-8 if dtype == torch.bfloat16 else 1e-5
        assert (ours.double() - theirs).norm() <= bound * theirs.norm()


@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (2, 4, 0, 5), (2, 4, 5, 0)])
def test_nothing_gives_nothing(shape):
    rows, heads_, queries, keys = shape
    inputs = [torch.randn(rows, heads_, n, 8, requires_grad=True) for n in (queries, keys, keys)]
    out = cpp.attention(*inputs, Mask(False))
    assert out.shape == inputs[0].shape
    assert not out.any()
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), inputs))


def test_descriptions_of_one_row_are_of_all():
    """Documents, and places, that broadcast or are not dense in memory."""
    inputs = heads()
    wide = torch.stack((DOCUMENTS[:1], DOCUMENTS[:1]), -1)
    slots, places = torch.tensor([7, 0, 3, 0])[::2], torch.arange(606)[::2]
    drop = WeightDropout(0.25, torch.tensor(random.key(0, "x")), slots, places)
    mask = Mask(True, wide[..., 0], prefix=torch.tensor([9, 0])[:1])
    ours, theirs = (value_and_gradients(f, inputs, mask, drop) for f in (cpp.attention, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    unheeded = Mask(False, prefix=torch.tensor([9, 0]))  # of a causal mask alone
    ours, theirs = (value_and_gradients(f, inputs, unheeded) for f in (cpp.attention, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_rows_that_are_not_dense():
    """Queries, keys and values as projections give them, and with a last dim that is not dense."""
    q, k, v = (torch.randn(2, 50, 4, 16, dtype=torch.float64) for _ in range(3))
    for turn in (lambda x: x.transpose(1, 2), lambda x: x.transpose(1, 2).mT.contiguous().mT):
        inputs = [turn(x).detach().requires_grad_() for x in (q, k, v)]
        ours, theirs = (value_and_gradients(f, inputs, Mask()) for f in (cpp.attention, reference))
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    out = cpp.attention(*(x.transpose(1, 2) for x in (q, k, v)), Mask())
    assert out.transpose(1, 2).is_contiguous()  # as the next projection reads it


PHASED = {
    "strided": {"stride": 16},
    "dilated": {"window": 10, "dilation": 3},
    "fixed": {"stride": 16, "summaries": 3},
}


@pytest.mark.parametrize("what", ["plain", "sink", "slopes", "bias", "dropout", "documents"])
@pytest.mark.parametrize("word", PHASED)
def test_phases_are_merged(word, what):
    """Scopes that are computed in parts: all that goes by places must stay with them."""
    row = mechanism(f"{word}+sink" if what == "sink" else word)
    x = dict(PHASED[word])
    if what == "sink":
        x["sink"] = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    places = torch.arange(303)
    bias = (
        Slopes(torch.tensor(geometric(6), dtype=torch.float64), places, places) if what == "slopes" else None
    )
    learned = None
    if what == "bias":
        learned = torch.randn(6, 303, 303, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        learned.requires_grad_()
    drop = None
    if what == "dropout":
        drop = WeightDropout(0.25, torch.tensor(random.key(0, "x")), torch.tensor([7, 3]), places)
    for causal in (True, False):
        mask = Mask(causal, DOCUMENTS if what == "documents" else None)

        def of(kernel, mask=mask):
            compute = row.kernels[kernel].compute
            given = lambda q, k, v, m, d, s, b=bias: compute(q, k, v, m, d, s, b, **x)  # noqa: E731
            more = [] if learned is None else [learned]
            return value_and_gradients(given, [*heads(), *more], mask, drop)

        for kernel in ("blocks", "cpp"):
            torch.testing.assert_close(of(kernel), of("reference"), rtol=1e-10, atol=1e-10)


def test_memory_grows_with_the_length():
    """Peak memory of a process, which sees what C++ holds too: a map of 8 heads x 8,192^2 in fp32 has 2 GiB."""
    program = """
        import re, torch
        from headway.kernels.attention import cpp
        from headway.kernels.attention.masks import Mask
        from headway.kernels.attention.scopes import Global
        def peak():
            return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
        def step(length, mask):
            q, k, v = (torch.randn(1, 8, length, 16, requires_grad=True) for _ in range(3))
            cpp.attention(q, k, v, mask).sum().backward()
        step(256, Mask())
        before = peak()
        step(8192, Mask())
        step(8192, Mask(False, scope=Global(64, 4, True)))
        print(peak() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 200  # MiB: a dozen tensors of 4 MiB, and buffers


def test_choice(monkeypatch):
    for dtype in (torch.float32, torch.bfloat16):
        for word in ("dense", "window", "bigbird", "strided", "softcap", "sink", "mla", "differential"):
            assert choose(word, dtype=dtype).name == "cpp"
        assert choose("dense", dtype=dtype, dropout=True).name == "cpp"
        assert choose("dense", dtype=dtype, bias=True, described=True).name == "cpp"
        assert choose("dense", dtype=dtype, bias=True).name == "cpp"
    assert choose("sparsemax").name == "blocks"
    assert choose("dense", dtype=torch.float64).name == "sdpa"
    assert choose("dense", dtype=torch.float16).name == "sdpa"
    with pytest.raises(KernelUnavailable, match=r"cpp.*runs on cpu.*not on cuda"):
        choose("dense", "cpp", device="cuda")
    with pytest.raises(KernelUnavailable, match=r"cpp.*bfloat16, float32, float64.*auto"):
        choose("dense", "cpp", dtype=torch.float16)
    monkeypatch.setattr(choice.cpp, "unavailable", lambda dtype=None: "no compiler")
    assert choose("dense").name == "sdpa"
    assert choose("dense", dropout=True).name == "blocks"
    assert choose("window").name == "blocks"
    with pytest.raises(KernelUnavailable, match=r"cpp.*no compiler.*auto"):
        choose("dense", "cpp")
