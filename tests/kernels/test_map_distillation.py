"""Distillation of attention maps against the usual way, and maps of others' models."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.attention.choose import KernelUnavailable
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.slopes import Slopes, geometric
from headway.kernels.map_distillation import (
    map_distillation_loss,
    map_distillation_sums,
    relation_heads,
    relation_loss,
)
from headway.kernels.maps.divergences import DIVERGENCES
from headway.tests.kernels.maps.usual import BATCH, FP64, LENGTH, SQUARE, check, draw, four, padding

LOSSES = list(DIVERGENCES)
KERNELS = ["reference", "chunked"]


def alibi(heads: int, queries: int, keys: int) -> Slopes:
    return Slopes(torch.tensor(geometric(heads)), torch.arange(queries), torch.arange(keys))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", SQUARE)
def test_self_attention(name: str, loss: str, kernel: str) -> None:
    torch.manual_seed(0)
    check(loss, kernel, four(), SQUARE[name])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("loss", LOSSES)
def test_other_shapes(loss: str, kernel: str) -> None:
    """Cross-attention, other widths, grouped keys, more heads of the teacher, scales and biases."""
    torch.manual_seed(0)
    real = padding(BATCH, 29)
    real[0] = False  # rows of the first sample see nothing
    check(loss, kernel, four(queries=13, keys=29), {})
    check(loss, kernel, four(queries=13, keys=29), {"mask": real})
    check(loss, kernel, four(teacher=(4, 2, 12), student=(4, 1, 5)), {"causal": True})
    check(loss, kernel, four(teacher=(6, 3, 8), student=(2, 1, 8)), {"mask": padding(BATCH, LENGTH)})
    check(loss, kernel, four(), {"scale": 0.3, "teacher_scale": 0.2})
    bias = draw(2, LENGTH, LENGTH, grad=True)
    check(loss, kernel, four(), {"student_bias": bias, "teacher_bias": draw(2, LENGTH, LENGTH)})
    described = {"student_bias": bias, "teacher_bias": alibi(4, LENGTH, LENGTH)}
    check(loss, kernel, four(teacher=(4, 4, 8)), {**described, "mask": padding(BATCH, LENGTH)})


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("loss", LOSSES)
def test_identical_models(loss: str, kernel: str) -> None:
    """Nothing to learn: loss and gradient are 0, exactly where one computes for both the same."""
    torch.manual_seed(0)
    q, k = draw(2, 2, 300, 16, dtype=torch.float32, grad=True), draw(2, 2, 300, 16, dtype=torch.float32)
    found = map_distillation_loss(q, k, q, k, loss=loss, causal=True, kernel=kernel)
    (gradient,) = torch.autograd.grad(found, q)
    # js in plain lines takes the logarithm of a sum: a rounding of fp32 a pair, of weights that sum to 1.
    assert -1e-7 <= found <= (1e-7 if (loss, kernel) == ("js", "reference") else 0)
    assert gradient.abs().max() <= (0 if kernel == "chunked" else 1e-7)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("loss", LOSSES)
def test_no_row_counts(loss: str, kernel: str) -> None:
    inputs = four(queries=9, keys=9)
    sums = map_distillation_sums(
        *inputs, loss=loss, mask=torch.zeros(BATCH, 9, dtype=torch.bool), kernel=kernel
    )
    assert sums.rows_B.tolist() == [0, 0]
    hidden = torch.zeros(1, 1, 9, 9, dtype=torch.bool)
    found = map_distillation_loss(*inputs, loss=loss, mask=hidden, kernel=kernel)
    assert found == 0
    for gradient in torch.autograd.grad(found + sums.loss_B.sum(), inputs[2:]):
        assert (gradient == 0).all()


def test_nothing_flows_to_the_teacher() -> None:
    inputs = [x.detach().requires_grad_() for x in four()]
    bias = draw(2, LENGTH, LENGTH, grad=True)
    for kernel in KERNELS:
        map_distillation_loss(*inputs, teacher_bias=bias, kernel=kernel).backward()
    assert inputs[0].grad is inputs[1].grad is bias.grad is None
    assert inputs[2].grad is not None


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_bert_of_transformers(loss: str) -> None:
    """Maps of a BERT that returns them, and the gradient of its weights; sentences of two lengths."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    facts = {"vocab_size": 30, "num_hidden_layers": 2, "intermediate_size": 16, "attn_implementation": "eager",
             "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_attention_heads": 4}  # fmt: skip
    teacher, student = (BertModel(BertConfig(hidden_size=width, **facts)).double() for width in (48, 32))
    ids, real = torch.randint(0, 30, (2, 19)), padding(2, 19)

    def run(model: BertModel) -> tuple[list[Tensor], list[Tensor]]:
        """Queries and keys of both layers, and maps."""
        found: list[Tensor] = []
        hooks = [
            part.register_forward_hook(
                lambda _, __, out: found.append(out.unflatten(2, (4, -1)).transpose(1, 2))
            )
            for layer in model.encoder.layer
            for part in (layer.attention.self.query, layer.attention.self.key)
        ]
        maps = model(ids, attention_mask=real.long(), output_attentions=True).attentions
        for hook in hooks:
            hook.remove()
        return found, maps

    (q_t, k_t, q_t2, k_t2), maps_t = run(teacher)
    (q_s, k_s, q_s2, k_s2), maps_s = run(student)
    ours = theirs = torch.zeros((), dtype=torch.float64)
    for qk in ((q_t, k_t, q_s, k_s), (q_t2, k_t2, q_s2, k_s2)):
        ours = ours + map_distillation_loss(*qk, loss=loss, mask=real)
    for p, q in zip(maps_t, maps_s, strict=True):
        p, q = (x.transpose(1, 2)[real] for x in (p.detach(), q))  # rows that are no padding, [N, H, S]
        keys = real.sum(1).repeat_interleave(real.sum(1))
        each = F.mse_loss(q, p, reduction="none") / keys[:, None, None]
        if loss == "kl":
            each = F.kl_div(q.clamp(min=1e-300).log(), p, reduction="none")
        theirs = theirs + each.sum() / (len(p) * 4)
    FP64(ours, theirs)
    weights = [layer.attention.self.query.weight for layer in student.encoder.layer]
    FP64(
        torch.autograd.grad(ours, weights, retain_graph=True),
        torch.autograd.grad(theirs, weights),
        atol=1e-14,
    )


def test_relations_of_minilm() -> None:
    """Relations from PyTorch's attention, of identity values: softmax(v v^T / sqrt(d)) itself."""
    torch.manual_seed(0)
    teacher, student = draw(2, 4, 23, 9), draw(2, 3, 23, 8, grad=True)
    ours = relation_loss(teacher, student, heads=6)
    maps = []
    for a in (teacher, student):
        split = a.permute(0, 2, 1, 3).reshape(2, 23, 6, -1).permute(0, 2, 1, 3)
        assert torch.equal(split, relation_heads(a, 6))
        eye = torch.eye(23, dtype=a.dtype).expand(2, 6, 23, 23)
        maps.append(F.scaled_dot_product_attention(split, split, eye))
    theirs = F.kl_div(maps[1].log(), maps[0], reduction="sum") / (2 * 6 * 23)
    FP64(ours, theirs)
    FP64(torch.autograd.grad(ours, student), torch.autograd.grad(theirs, student))
    with pytest.raises(ValueError, match="heads = 5: relation heads must divide the width, 36"):
        relation_heads(teacher, 5)


def test_scores_of_tinybert() -> None:
    torch.manual_seed(0)
    qt, kt, qs, ks = four()
    ours = map_distillation_loss(qt, kt, qs, ks, loss="scores")
    theirs = F.mse_loss(qs @ ks.mT / math.sqrt(8), qt @ kt.mT / math.sqrt(8))
    FP64(ours, theirs)
    FP64(torch.autograd.grad(ours, (qs, ks)), torch.autograd.grad(theirs, (qs, ks)))


X = torch.zeros(2, 4, 6, 8)
WRONG = {
    "loss = 'l1': losses of maps are kl": {"loss": "l1"},
    r"q_teacher has 6 heads: .* multiple of the student's 4.*index_select":
        {"q_teacher": X[:, :1].expand(2, 6, 6, 8), "k_teacher": X[:, :2]},
    "q_teacher, k_teacher: batch, queries and keys": {"q_teacher": X[:, :, :5]},
    "q_student, k_student are": {"q_student": X[..., :7]},
    "k_student has 3 heads: they must divide the 4": {"k_student": X[:, :3]},
    "one floating dtype": {"k_student": X.double()},
    r"student_bias is \[1, 6, 6\]": {"student_bias": X[0, :1, :, :6]},
    r"mask is \[2, 5\]": {"mask": X[:, 0, :5, 0].bool()},
    r"mask is \[2, 4, 6, 6\]: it must be .* \[B, 1, Q, S\]": {"mask": X[..., :6].bool()},
    "must be bool": {"mask": X[:, 0, :, 0]},
    "mask.split": {"mask": Mask(split=(6, 6))},
    "causal: 6 queries and 5 keys": {"k_student": X[:, :, :5], "k_teacher": X[:, :, :5], "causal": True},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_errors(message: str) -> None:
    given = dict.fromkeys(("q_teacher", "k_teacher", "q_student", "k_student"), X) | WRONG[message]
    operands = [given.pop(name) for name in ("q_teacher", "k_teacher", "q_student", "k_student")]
    with pytest.raises(ValueError, match=message):
        map_distillation_loss(*operands, **given)


def test_kernels_by_name() -> None:
    with pytest.raises(KernelUnavailable, match="maps are distilled by reference, chunked, triton"):
        map_distillation_loss(X, X, X, X, kernel="sdpa")
    with pytest.raises(KernelUnavailable, match="runs on cuda, not on cpu; nearest legal choice: chunked"):
        map_distillation_loss(X, X, X, X, kernel="triton")
