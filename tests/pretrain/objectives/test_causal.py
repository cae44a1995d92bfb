"""The causal objective: batches, counts, sums, names."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from headway.kernels.cross_entropy import IGNORE
from headway.pretrain import config
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.objectives import build_objective

VOCAB, LENGTH = 61, 12


def build(documents="attend", tied=True, **objective):
    model = config.Model(layers=2, hidden=32, heads=4, tied=tied, positions="rotary")
    data = config.Data(seq_len=LENGTH, documents=documents)
    return build_objective(
        config.Job(model=model, data=data, objective=config.Objective(**objective)), Inputs(VOCAB, LENGTH)
    )


def rows(n=3):
    rng = np.random.default_rng(0)
    return {
        "tokens": rng.integers(0, VOCAB, (n, LENGTH + 1)),
        "documents": np.sort(rng.integers(0, 3, (n, LENGTH + 1)), 1).astype(np.int32),
        "scored": rng.random((n, LENGTH)) < 0.8,
        "sample": np.arange(n) + 10,
        "slot": np.arange(n),
    }


def test_collate():
    given = rows()
    batch = build("isolate").collate(given)
    assert set(batch) == {"tokens", "labels", "documents", "real", "sample", "slot"}
    np.testing.assert_array_equal(batch["tokens"], given["tokens"][:, :-1])
    np.testing.assert_array_equal(batch["documents"], given["documents"][:, :-1])
    np.testing.assert_array_equal(batch["labels"], np.where(given["scored"], given["tokens"][:, 1:], IGNORE))
    assert "documents" not in build().collate(given)
    assert (given["tokens"][:, 1:] >= 0).all()  # the rows were not written to


def test_loss_is_the_sum_over_scored_tokens():
    objective = build(z_loss=1e-2, chunk=7)
    batch = objective.collate(rows())
    out = objective(batch)
    logits = objective.logits(batch["tokens"])
    nll = F.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum", ignore_index=IGNORE
    )
    z = 1e-2 * logits.logsumexp(-1)[batch["labels"] != IGNORE].square().sum()
    torch.testing.assert_close(out.terms["tokens"], nll + z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.metrics["z_loss"].sum, z, rtol=1e-5, atol=1e-5)
    assert out.metrics["z_loss"].over == objective.counts(batch)["tokens"] == rows()["scored"].sum()


def test_sums_add_up_over_micro_batches():
    objective = build()
    batch = objective.collate(rows())
    parts = [objective({k: v[r] for k, v in batch.items()}) for r in (slice(0, 1), slice(1, 3))]
    whole = objective(batch)
    torch.testing.assert_close(sum(p.terms["tokens"] for p in parts), whole.terms["tokens"])


@pytest.mark.parametrize("tied", [True, False])
def test_names_are_canonical(tied):
    names = list(build(tied=tied).state_dict())
    assert names[0] == "model.embed.tokens.weight"
    assert "model.blocks.1.attention.q.weight" in names
    assert ("head.weight" in names) is not tied
    assert list(dict(build(tied=tied).named_parameters())) == names


def test_isolation_reaches_the_model():
    batch = build("isolate").collate(rows())
    assert build("isolate")(batch).terms != build()(build().collate(rows())).terms


def test_compiled_objective_needs_no_break():
    torch.compiler.reset()
    objective = build(z_loss=1e-3)
    batch = objective.collate(rows())
    expected = objective(batch)
    expected.terms["tokens"].backward()
    gradients = {n: p.grad.clone() for n, p in objective.named_parameters()}
    objective.zero_grad()
    for block in objective.model.blocks:
        block.compile(fullgraph=True)
    objective.loss.compile(fullgraph=True)
    out = objective(batch)
    out.terms["tokens"].backward()
    torch.testing.assert_close(out.terms["tokens"], expected.terms["tokens"], rtol=1e-5, atol=1e-4)
    for name, p in objective.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-5)


def test_one_batch_is_learned():
    objective = build(tied=False)
    batch = objective.collate(rows())
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    for _ in range(60):
        out = objective(batch)
        (out.terms["tokens"] / objective.counts(batch)["tokens"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert objective(batch).terms["tokens"] / objective.counts(batch)["tokens"] < 0.1
