"""Soft targets in chunks against torch's divergences of whole logits, torchdistill, TextBrewer and SciPy."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import jensenshannon

from headway.kernels.cross_entropy import IGNORE, Options, linear_cross_entropy
from headway.kernels.soft_targets import DIVERGENCES, FullTeacher, Soft, TopTeacher, soft_row_loss
from headway.tests import oracles

ROWS, HIDDEN, OTHER, VOCAB = 37, 12, 7, 53


def sample(dtype=torch.float64):
    """A student (rows, head, bias, labels), and a teacher of another width."""
    draw = torch.Generator().manual_seed(0)
    sizes = (ROWS, HIDDEN), (VOCAB, HIDDEN), (VOCAB,), (ROWS, OTHER), (VOCAB, OTHER), (VOCAB,)
    x, w, b, *teacher = (torch.randn(size, generator=draw, dtype=torch.float64).to(dtype) for size in sizes)
    labels = torch.randint(0, VOCAB, (ROWS,), generator=draw)
    labels[3:9] = IGNORE
    return [t.requires_grad_() for t in (x, w, b)], labels, FullTeacher(*teacher)


def logits_of(teacher):
    return F.linear(*teacher)


def top_of(logits, k, temperature):
    return TopTeacher(*logits.topk(k), (logits / temperature).logsumexp(1))


def outcomes(log_p, indices):
    """Log-probabilities [N, k + 1] of words and of all others, by the sum over these."""
    others = torch.ones_like(log_p, dtype=torch.bool).scatter(1, indices, False)
    rest = log_p.masked_fill(~others, -math.inf).logsumexp(1, keepdim=True)
    return torch.cat([log_p.gather(1, indices), rest], 1)


def divergence(logits, teacher, soft, indices=None):
    """τ² D of every row, by autograd's own functions."""
    log_q, log_p = ((z / soft.temperature).log_softmax(1) for z in (logits, teacher))
    if indices is not None:
        log_q, log_p = outcomes(log_q, indices), outcomes(log_p, indices)
    if soft.divergence == "forward":
        each = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    elif soft.divergence == "reverse":
        each = F.kl_div(log_p, log_q, reduction="none", log_target=True)
    else:
        log_m = ((log_p.exp() + log_q.exp()) / 2).log()
        each = sum(F.kl_div(log_m, x, reduction="none", log_target=True) / 2 for x in (log_p, log_q))
    return soft.temperature**2 * each.sum(1)


def kinds(test):
    test = pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])(test)
    return pytest.mark.parametrize("kind", DIVERGENCES)(test)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 8, None])
@pytest.mark.parametrize("k", [None, 1, 6])
@kinds
def test_value_and_gradients(kind, temperature, k, chunk, with_bias):
    (x, w, b), labels, teacher = sample()
    if not with_bias:
        b, teacher = None, teacher._replace(bias_V=None)
    soft, options, valid = Soft(temperature, kind, 0.7, 0.3), Options(0.01, 0.1, True), labels != IGNORE
    theirs = logits_of(teacher)
    given = teacher if k is None else top_of(theirs, k, temperature)
    found = linear_cross_entropy(x, w, labels, options, chunk, None, b, soft, given)

    logits = F.linear(x, w, b)
    each = torch.where(valid, divergence(logits, theirs, soft, None if k is None else given.indices_Nk), 0)
    task = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none", label_smoothing=0.1)
    task = task + 0.01 * torch.where(valid, logits.logsumexp(1).square(), 0)
    rows = 0.3 * task + 0.7 * each
    expected = rows.sum(), rows, task.sum(), each.sum()
    # fp64; sums of 53 terms in another order, times 25
    torch.testing.assert_close(
        (found.total, found.each, found.task, found.soft), expected, rtol=1e-11, atol=1e-11
    )
    assert not any(part.requires_grad for part in found[1:])
    assert found.correct == (logits.argmax(1) == labels)[valid].sum()
    inputs = (x, w) if b is None else (x, w, b)
    ours, autograd = (torch.autograd.grad(y * 0.37, inputs) for y in (found.total, rows.sum()))
    torch.testing.assert_close(ours, autograd, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("task", [0.0, 1.0])
def test_gradients_by_differences(task):
    (x, w, b), labels, (hidden, head, _) = sample()
    x, w, b, labels = x[:5, :3].detach(), w[:9, :3].detach(), b[:9].detach(), labels[:5] % 9
    inputs, teacher = [t.requires_grad_() for t in (x, w, b)], FullTeacher(hidden[:5], head[:9])

    labels[3:] = IGNORE

    def loss(x, w, b, how):
        return linear_cross_entropy(x, w, labels, Options(), 4, None, b, *how)[0]

    for kind in DIVERGENCES:
        for given in (teacher, top_of(logits_of(teacher), 4, 2.0)):
            how = Soft(2.0, kind, 0.5, task), given
            assert torch.autograd.gradcheck(functools.partial(loss, how=how), inputs)


@kinds
def test_all_words_at_the_top_are_a_full_teacher(kind, temperature):
    (x, w, b), labels, teacher = sample()
    soft, top = Soft(temperature, kind), top_of(logits_of(teacher), VOCAB, temperature)
    one, other = (linear_cross_entropy(x, w, labels, Options(), 8, None, b, soft, t) for t in (teacher, top))
    # "Any other" has epsilon of p: 2e-16 x 36 nats x 25, 31 rows.
    torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    one, other = (torch.autograd.grad(found.total, (x, w, b)) for found in (one, other))
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_torchdistill_and_textbrewer(temperature):
    (x, w, b), labels, teacher = sample()
    kd_loss, kd_ce_loss = oracles.distillation()
    soft = Soft(temperature, weight=0.7, task=0.3)
    found = linear_cross_entropy(x, w, labels, Options(), 8, None, b, soft, teacher)
    valid = labels != IGNORE
    logits, theirs = F.linear(x, w, b)[valid], logits_of(teacher)[valid]
    criterion = kd_loss("a", "b", "a", "b", temperature, alpha=0.3, beta=0.7)
    expected = criterion({"a": {"b": logits}}, {"a": {"b": theirs}}, labels[valid])
    torch.testing.assert_close(found.total / valid.sum(), expected, rtol=1e-12, atol=1e-12)
    gradient = torch.autograd.grad(found.total / valid.sum(), x)[0]
    torch.testing.assert_close(
        gradient, torch.autograd.grad(expected, x, retain_graph=True)[0], rtol=1e-11, atol=1e-12
    )
    # TextBrewer's is a cross-entropy, without the teacher's entropy and τ², neither of which turns the gradient.
    alone = linear_cross_entropy(x, w, labels, Options(), 8, None, b, soft._replace(task=0.0), teacher).total
    crossed = 0.7 * temperature**2 * kd_ce_loss(logits, theirs, temperature) * valid.sum()
    one, other = (torch.autograd.grad(y, x, retain_graph=True)[0] for y in (alone, crossed))
    torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_the_js_divergence_is_scipys():
    (x, w, b), _, teacher = sample()
    logits, theirs = F.linear(x, w, b).detach(), logits_of(teacher)
    each = soft_row_loss(logits, theirs, torch.ones(ROWS, dtype=torch.bool), Soft(1.0, "js"), False)[1]
    expected = jensenshannon(logits.softmax(1).numpy(), theirs.softmax(1).numpy(), axis=1) ** 2
    torch.testing.assert_close(each, torch.from_numpy(expected), rtol=1e-12, atol=1e-14)


def test_a_student_that_equals_its_teacher_loses_nothing():
    logits = logits_of(sample()[2]).float()
    valid = torch.ones(ROWS, dtype=torch.bool)
    for kind in DIVERGENCES:
        for given in (logits, top_of(logits, 5, 2.0)):
            total, _, gradient = soft_row_loss(logits, given, valid, Soft(2.0, kind), True)
            # fp32: logarithms off by 2^-24 x 16, weighted by p, 37 rows, τ² = 4
            assert abs(total) < 37 * 4 * 16 * 2**-24
            assert gradient.abs().max() < 2 * 32 * 2**-24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_give_finite_losses_and_gradients(dtype):
    """A student or a teacher that is sure, also of another word: masses elsewhere underflow, or are exactly 0."""
    student = torch.zeros(4, 30, dtype=dtype)
    student[0, 3] = student[1, 4] = 1000.0
    student[3] = -1000.0 * torch.arange(30)
    teacher = torch.zeros(4, 30)
    teacher[0, 5] = teacher[1, 4] = teacher[2, 6] = 1000.0
    for kind in DIVERGENCES:
        for k in (None, 1, 7, 30):
            given = teacher if k is None else top_of(teacher, k, 1.0)
            total, each, gradient = soft_row_loss(
                student, given, torch.ones(4, dtype=torch.bool), Soft(1.0, kind), True
            )
            assert total.isfinite()
            assert gradient.isfinite().all()
            assert (each > -1e-5).all()
            assert each[1].abs() < 1000 * 2**-22  # both are sure of one word; "any other" has 2^-23 of p
            assert gradient.sum(1).abs().max() <= gradient.abs().max() * 1e-5


def test_mass_in_the_tail_that_fp32_cannot_subtract():
    """A student's mass elsewhere is its sum, not what is missing to 1: here 3e-12 of 1."""
    student, teacher = torch.zeros(1, 4, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)
    student[0, 0], teacher[0, 0] = 27.7, 2.0
    results = []
    for dtype in (torch.float32, torch.float64):
        given = top_of(teacher.to(dtype), 1, 1.0)
        _, each, gradient = soft_row_loss(student.to(dtype), given, torch.tensor([True]), Soft(), True)
        results.append((each.double(), gradient.double()))
    torch.testing.assert_close(*results, rtol=2e-6, atol=0)


def test_bf16_products_with_fp32_divergences():
    draw = torch.Generator().manual_seed(0)
    x, w, hidden, head = (
        torch.randn(size, 64, generator=draw).requires_grad_() for size in (512, 1000, 512, 1000)
    )
    labels, soft = torch.randint(0, 1000, (512,), generator=draw), Soft(4.0, weight=1.0, task=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(x, w, labels, chunk=100, soft=soft, teacher=FullTeacher(hidden, head))
    assert found.total.dtype == found.soft.dtype == torch.float32
    rounded, theirs = ([t.detach().bfloat16().double() for t in pair] for pair in ((x, w), (hidden, head)))
    logits = F.linear(*(t.requires_grad_() for t in rounded))
    exact = divergence(logits, F.linear(*theirs), soft).sum()
    expected = 0.5 * F.cross_entropy(logits, labels, reduction="sum") + exact
    # Logits (deviation 8) are rounded to 8 bits, 2^-9 x 8 each, of student and teacher: τ (p - q) times that,
    # random over rows; and a softmax of logits / 4 off by that much / 4.
    assert abs(found.soft - exact) / 512 < 2e-2
    assert abs(found.total - expected) / 512 < 3e-2
    ours, autograd = torch.autograd.grad(found.total, (x, w)), torch.autograd.grad(expected, rounded)
    for a, b in zip(ours, autograd, strict=True):
        assert (a - b).norm() / b.norm() < 0.03
    assert hidden.grad is None
    assert head.grad is None


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("k", [None, 6])
def test_compiled_rows_and_compiled_whole(k, kind):
    (x, w, _), labels, teacher = sample(torch.float32)
    soft, given = Soft(2.0, kind), teacher if k is None else top_of(logits_of(teacher), k, 2.0)

    def loss(x, w, compute=None):
        return linear_cross_entropy(x, w, labels, soft=soft, teacher=given, compute_soft=compute)[0]

    expected = loss(x, w)
    gradients = torch.autograd.grad(expected, (x, w))
    rows = torch.compile(soft_row_loss, fullgraph=True)
    everything = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for total in (loss(x, w, rows), everything(x, w)):
        # fp32 sums of 37 x 53 terms in another order
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(total, (x, w)), gradients, rtol=1e-4, atol=1e-5)


def test_a_teachers_logits_never_exist_whole():
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            sizes = [t.numel() for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t)]
            largest = max([largest, *sizes])
            return out

    draw = torch.Generator().manual_seed(0)
    x, w = (torch.randn(size, 8, generator=draw).requires_grad_() for size in (2048, 997))
    labels = torch.randint(0, 997, (2048,), generator=draw)
    teacher = FullTeacher(torch.randn(2048, 4), torch.randn(997, 4))
    with Largest():
        linear_cross_entropy(x, w, labels, chunk=128, soft=Soft(), teacher=teacher)[0].backward()
    assert largest <= 128 * 997


def test_without_a_teacher_soft_changes_no_bit():
    (x, w, b), labels, _ = sample(torch.float32)
    plain, other = (
        linear_cross_entropy(x, w, labels, Options(0.01), 8, None, b, soft)
        for soft in (None, Soft(2.0, "js", 3.0, 0.5))
    )
    assert all(torch.equal(one, two) for one, two in zip(plain, other, strict=True))
    one, two = (torch.autograd.grad(found.total, (x, w, b)) for found in (plain, other))
    assert all(torch.equal(*pair) for pair in zip(one, two, strict=True))


def test_a_task_of_weight_1_beside_a_teacher_of_weight_0_is_the_task():
    (x, w, b), labels, teacher = sample(torch.float32)
    plain = linear_cross_entropy(x, w, labels, Options(0.01), 8, None, b)
    other = linear_cross_entropy(x, w, labels, Options(0.01), 8, None, b, Soft(weight=0.0), teacher)
    assert all(torch.equal(one, two) for one, two in zip(plain[:5], other[:5], strict=True))
    assert other.soft > 0
    one, two = (torch.autograd.grad(found.total, (x, w, b)) for found in (plain, other))
    assert all(torch.equal(*pair) for pair in zip(one, two, strict=True))


def test_rows_that_do_not_count_and_no_rows_at_all():
    (x, w, b), labels, teacher = sample()
    for given in (teacher, top_of(logits_of(teacher), 5, 1.0)):
        nowhere = torch.full_like(labels, IGNORE)
        found = linear_cross_entropy(x, w, nowhere, Options(), 8, None, b, Soft(), given)
        assert found.total == found.soft == 0
        assert all((g == 0).all() for g in torch.autograd.grad(found.total, (x, w, b)))
        empty = type(given)(given[0][:0], *(given[1:] if given is teacher else (t[:0] for t in given[1:])))
        found = linear_cross_entropy(x[:0], w, labels[:0], Options(), 8, None, b, Soft(), empty)
        assert found.total == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"soft": None}, "teacher is given, soft is None"),
        ({"soft": Soft(divergence="kl")}, "divergence 'kl': must be one of forward, reverse, js"),
        ({"soft": Soft(temperature=0.0)}, "temperature 0.0: must be above 0"),
        ({"teacher": FullTeacher(torch.ones(3, 4), torch.ones(VOCAB, 4))}, "teacher of 3 rows.*37"),
        ({"teacher": FullTeacher(torch.ones(ROWS, 4), torch.ones(9, 4))}, "teacher of 9 words.*53"),
    ],
)
def test_what_cannot_be_computed_is_refused(change, message):
    (x, w, _), labels, teacher = sample()
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(x, w, labels, **({"soft": Soft(), "teacher": teacher} | change))
