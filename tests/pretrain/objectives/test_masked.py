"""Masked language modelling: batches are functions of keys, losses those of torch's cross-entropy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from headway.kernels.cross_entropy import IGNORE
from headway.pretrain.data.token_rows import TokenRows
from headway.tests.parallel.family_cases import LENGTH, SPECIALS, STARTS, Texts, build, job_of, rows_of

COUNT = 12
IDS = SPECIALS.ids


def made(name, count=COUNT):
    objective, samples = build(job_of(name, {}, 4, 12), "cpu")
    return objective, rows_of(samples, count)


@pytest.mark.parametrize("name", ["bert", "albert", "roberta"])
def test_a_batch_is_a_function_of_each_rows_key(name):
    objective, rows = made(name)
    batch = objective.collate(rows)
    order = np.random.default_rng(0).permutation(COUNT)
    shuffled = objective.collate({key: value[order] for key, value in rows.items()})
    assert all(torch.equal(shuffled[key], value[order]) for key, value in batch.items())
    other = objective.collate(rows | {"key": rows["key"] + 1})
    assert not torch.equal(other["labels"], batch["labels"])
    assert {k for k in batch if not torch.equal(batch[k], other[k])} == {"tokens", "labels"}


def test_pairs_of_segments_as_they_are_masked():
    objective, rows = made("bert")
    batch = objective.collate(rows)
    assert set(batch) == {"tokens", "labels", "segments", "documents", "pair", "sample", "slot"}
    assert all(batch[k].shape == (COUNT, LENGTH) for k in ("tokens", "labels", "segments", "documents"))
    chosen = (batch["labels"] != IGNORE).numpy()
    assert not chosen[~rows["maskable"]].any()
    np.testing.assert_array_equal(batch["labels"].numpy()[chosen], rows["tokens"][chosen])
    np.testing.assert_array_equal(batch["tokens"].numpy()[~chosen], rows["tokens"][~chosen])
    np.testing.assert_array_equal(batch["pair"], rows["label"])
    padding = batch["tokens"].numpy() == IDS["pad"]
    assert padding.any()
    np.testing.assert_array_equal(batch["documents"].numpy() == -1, padding)


def test_rows_of_a_flat_stream_are_framed():
    objective, rows = made("roberta")
    batch = objective.collate(rows)
    tokens = torch.where(batch["labels"] == IGNORE, batch["tokens"], batch["labels"]).numpy()
    assert (tokens[:, 0] == IDS["cls"]).all()
    assert (tokens[:, -1] == IDS["sep"]).all()
    np.testing.assert_array_equal(tokens[:, 1:-1], rows["tokens"][:, :-1])
    assert not (batch["labels"] == SPECIALS.separator).any()
    documents = batch["documents"].numpy()
    np.testing.assert_array_equal(documents[:, 1:-1], rows["documents"][:, :-1])
    np.testing.assert_array_equal(documents[:, [0, -1]], documents[:, [1, -2]])


def test_words_are_masked_whole():
    objective, rows = made("albert", 60)
    labels, tokens = objective.collate(rows)["labels"].numpy(), rows["tokens"]
    chosen, maskable = labels != IGNORE, rows["maskable"]
    goes_on = maskable[:, 1:] & maskable[:, :-1] & ~STARTS[tokens[:, 1:]]
    split = goes_on & (chosen[:, 1:] != chosen[:, :-1])
    # A budget that is smaller than every word takes a part of one: in such rows only.
    budgets = np.maximum(1, np.round(0.3 * maskable.sum(1)))
    assert (chosen.sum(1) <= budgets).all()
    rows_split = split.any(1)
    assert rows_split.mean() < 0.2
    assert (chosen.sum(1) == budgets)[rows_split].all()
    assert chosen[:, 1:][goes_on].any()
    objective.starts = np.ones_like(STARTS)  # each token a word
    assert not np.array_equal(objective.collate(rows)["labels"].numpy(), labels)


def test_loss_is_torchs():
    objective, rows = made("bert")
    batch = objective.collate(rows)
    out, counts = objective(batch), objective.counts(batch)
    logits = objective.logits(batch["tokens"], batch["documents"], batch["segments"])
    labels = batch["labels"]
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(out.terms["tokens"], nll, rtol=1e-12, atol=0)
    hits = ((logits.argmax(-1) == labels) & (labels != IGNORE)).sum()
    assert out.metrics["accuracy"].sum == hits
    assert out.metrics["accuracy"].over == counts["tokens"] == (labels != IGNORE).sum()
    assert counts["rows"] == counts["pairs"] == COUNT
    assert counts["read"] == COUNT * LENGTH
    pooled = objective.model(batch["tokens"], batch["documents"], batch["segments"]).pooled
    scores = objective.pair(pooled)
    torch.testing.assert_close(
        out.terms["pairs"], F.cross_entropy(scores, batch["pair"], reduction="sum"), rtol=1e-12, atol=0
    )
    assert out.metrics["pair_accuracy"].sum == (scores.argmax(1) == batch["pair"]).sum()
    assert out.metrics["pair_accuracy"].over == COUNT


def test_rows_that_are_not_scored_count_nothing():
    objective, rows = made("bert")
    real = np.arange(COUNT) % 3 > 0
    batch = objective.collate(rows | {"scored": real})
    part = objective.collate({key: value[real] for key, value in rows.items()})
    counts, expected = objective.counts(batch), objective.counts(part)
    assert all(counts[k] == expected[k] for k in ("tokens", "pairs"))
    ours, theirs = objective(batch), objective(part)
    for key, value in theirs.terms.items():
        torch.testing.assert_close(ours.terms[key], value, rtol=1e-12, atol=0)
    for key, mean in theirs.metrics.items():
        assert ours.metrics[key] == mean
    nothing = objective.collate(rows | {"scored": np.zeros(COUNT, bool)})
    assert objective.counts(nothing)["tokens"] == objective.counts(nothing)["pairs"] == 0
    out = objective(nothing)
    assert out.terms["tokens"] == out.terms["pairs"] == 0


def test_a_pooler_that_nothing_reads_is_not_trained():
    """Its gradient would never come, and replicas would wait for it."""
    objective, rows = made("roberta")
    out = objective(objective.collate(rows))
    sum(out.terms.values()).backward()
    for name, p in objective.named_parameters():
        assert p.requires_grad == (p.grad is not None) == ("pooler" not in name), name


def test_padding_does_not_change_what_is_predicted():
    objective, rows = made("bert")
    batch = objective.collate(rows)
    longest = int((batch["documents"] >= 0).sum(1)[0])
    one = {key: value[:1] for key, value in batch.items()}
    cut = {key: value[:, :longest] if value.dim() == 2 else value for key, value in one.items()}
    for key, value in objective(cut).terms.items():
        torch.testing.assert_close(objective(one).terms[key], value, rtol=1e-12, atol=0)


def test_rows_are_not_written_to():
    objective, _ = build(job_of("roberta", {}, 4, 12), "cpu")
    rows = rows_of(TokenRows(Texts(0), LENGTH - 2, 0), 4)
    before = {key: value.copy() for key, value in rows.items()}
    objective.collate(rows)
    assert all(np.array_equal(rows[key], value) for key, value in before.items())
