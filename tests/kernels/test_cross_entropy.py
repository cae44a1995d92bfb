"""Chunked head and cross-entropy against torch's own, whole."""

import pytest
import torch
import torch.nn.functional as F

from headway.kernels.cross_entropy import IGNORE, Options, chunk_rows, linear_cross_entropy, row_loss


def sample(rows=37, hidden=12, vocab=53, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, hidden, generator=generator, dtype=dtype, requires_grad=True)
    w = torch.randn(vocab, hidden, generator=generator, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[3:9] = IGNORE
    return x, w, labels


def whole(x, w, labels, z_loss):
    logits = x @ w.T
    lse = logits.logsumexp(-1)[labels != IGNORE]
    z = z_loss * lse.square().sum()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") + z, z


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 8, 37, 100, None])
def test_value_and_gradients(z_loss, chunk):
    x, w, labels = sample()
    total, z, _, each, task, soft = linear_cross_entropy(x, w, labels, Options(z_loss), chunk)
    expected, expected_z = whole(x, w, labels, z_loss)
    torch.testing.assert_close((total, z), (expected, expected_z), rtol=1e-12, atol=1e-12)
    assert not z.requires_grad
    rows = [whole(x[i : i + 1], w, labels[i : i + 1], z_loss)[0].detach() for i in range(len(x))]
    torch.testing.assert_close(each, torch.stack(rows), rtol=1e-12, atol=1e-12)
    assert not each.requires_grad
    assert (task, soft) == (total, 0)  # without a teacher
    assert not task.requires_grad
    ours, theirs = (torch.autograd.grad(y * 0.37, (x, w)) for y in (total, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_nothing_valid_is_zero_with_zero_gradients():
    x, w, labels = sample()
    total = linear_cross_entropy(x, w, torch.full_like(labels, IGNORE), Options(0.1), 8).total
    assert total.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(total, (x, w)))


def test_ignored_rows_that_are_not_finite_do_not_matter():
    x, w, labels = sample()
    wild = x.detach().clone()
    wild[3:9] = 1e300
    assert linear_cross_entropy(wild, w, labels)[0] == linear_cross_entropy(x, w, labels)[0]


def test_bf16_products_with_fp32_softmax():
    x, w, labels = sample(512, 64, 1000, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        total = linear_cross_entropy(x, w, labels, chunk=100).total
    assert total.dtype == torch.float32
    rounded = [t.detach().bfloat16().double().requires_grad_() for t in (x, w)]
    expected, _ = whole(*rounded, labels, 0.0)
    # Logits (deviation 8, largest about 40) are rounded to 8 bits: 2^-9 x 8 a row, random, over sqrt(506) rows.
    assert abs(total - expected) / 506 < 1e-2
    ours, theirs = torch.autograd.grad(total, (x, w)), torch.autograd.grad(expected, rounded)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() / b.norm() < 0.03  # softmax of logits off by 2^-9 x 8


def test_compiled_rows_and_compiled_whole():
    x, w, labels = sample(64, 16, 101, torch.float32)
    expected = linear_cross_entropy(x, w, labels, Options(0.01), 32)[0]
    gradients = torch.autograd.grad(expected, (x, w))
    rows = torch.compile(row_loss, fullgraph=True)
    everything = torch.compile(lambda *a: linear_cross_entropy(*a, Options(0.01), 32), fullgraph=True)
    for total in (
        linear_cross_entropy(x, w, labels, Options(0.01), 32, rows)[0],
        everything(x, w, labels)[0],
    ):
        # fp32 sums of 64 x 101 terms in another order.
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(total, (x, w)), gradients, rtol=1e-4, atol=1e-5)


def test_full_logits_never_exist():
    rows, vocab = 4096, 997
    x, w, _ = sample(rows, 8, vocab, torch.float32)
    labels = torch.randint(0, vocab, (rows,))
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(
                [largest, *(t.numel() for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t))]
            )
            return out

    with Largest():
        linear_cross_entropy(x, w, labels, chunk=128)[0].backward()
    assert largest <= 128 * vocab


def test_without_gradients_none_are_computed():
    x, w, labels = sample()
    with torch.no_grad():
        seen = []
        linear_cross_entropy(x, w, labels, compute=lambda *a: seen.append(a[3]) or row_loss(*a))
    assert seen == [False]


def test_chunks_shrink_as_the_vocabulary_grows():
    assert chunk_rows(16384, 2, "cpu") == 2048
    assert chunk_rows(16384, 4, "cpu") == 1024
    assert chunk_rows(10**6, 4, "cpu") == 128


@pytest.mark.parametrize("chunk", [5, None])
def test_bias_smoothing_and_accuracy(chunk):
    x, w, labels = sample()
    b = torch.linspace(-1, 1, 53, dtype=torch.float64, requires_grad=True)
    found = linear_cross_entropy(x, w, labels, Options(0.01, 0.1, True), chunk, bias_V=b)
    logits = x @ w.T + b
    valid = labels != IGNORE
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum", label_smoothing=0.1)
    expected = expected + 0.01 * logits.logsumexp(-1)[valid].square().sum()
    torch.testing.assert_close(found.total, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.each.sum(), found.total.detach(), rtol=1e-12, atol=1e-12)
    assert not found.each[~valid].any()
    assert found.correct == (logits.argmax(1) == labels)[valid].sum()
    ours, theirs = (torch.autograd.grad(y, (x, w, b)) for y in (found.total, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_no_rows_at_all():
    x, w, labels = sample()
    found = linear_cross_entropy(x[:0], w, labels[:0])
    assert found.total == 0
    assert (torch.autograd.grad(found.total, w)[0] == 0).all()
