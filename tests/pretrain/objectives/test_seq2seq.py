"""Encoder-decoder objectives: what rows become, losses by torch's cross-entropy, padding that is not seen."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from headway.kernels.cross_entropy import IGNORE
from headway.pretrain.config import Job
from headway.pretrain.data.corruption import denoisers, spans
from headway.pretrain.data.dataset import row_lengths
from headway.pretrain.data.token_rows import TokenRows
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.objectives import build_objective
from headway.tests.parallel.family_cases import LENGTH, SPECIALS, Texts, build, job_of, rows_of

COUNT = 12
PAD, END = SPECIALS.ids["pad"], SPECIALS.separator


def made(name):
    objective, samples = build(job_of(name, {}, 4, 12), "cpu")
    return objective, rows_of(samples, COUNT)


def prefix():
    model = {"family": "t5", "layers": 1, "hidden": 24, "heads": 3, "positions": "rotary"}
    job = Job.model_validate(
        {"model": model, "objective": {"name": "prefix"}, "data": {"seq_len": LENGTH}, "precision": "fp64"}
    )
    raw, target = row_lengths(job)
    objective = build_objective(job, Inputs(SPECIALS.vocab, LENGTH, target), SPECIALS)
    return objective, rows_of(TokenRows(Texts(0), raw, END), COUNT)


def spelled(batch, i):
    """What a row's targets say, in order, without padding: labels, and what the decoder read before each."""
    labels, read = batch["labels"][i], batch["targets"][i]
    asked = labels != IGNORE
    assert asked[: int(asked.sum())].all()
    return labels[asked].tolist(), read[asked].tolist()


@pytest.mark.parametrize("name", ["t5", "ul2", "transformer", "prefix"])
def test_the_decoder_reads_pad_and_then_its_targets(name):
    objective, rows = prefix() if name == "prefix" else made(name)
    batch = objective.collate(rows)
    for i in range(COUNT):
        labels, read = spelled(batch, i)
        assert read == [PAD, *labels[:-1]]
        assert labels[-1] == END
    order = np.random.default_rng(0).permutation(COUNT)
    shuffled = objective.collate({key: value[order] for key, value in rows.items()})
    assert all(torch.equal(shuffled[key], value[order]) for key, value in batch.items())


def test_spans():
    objective, rows = made("t5")
    batch = objective.collate(rows)
    raw = rows["tokens"][:, :-1]
    inputs, targets = spans.corrupt(raw, rows["key"], objective.settings.spans, SPECIALS)
    np.testing.assert_array_equal(batch["tokens"], inputs)
    np.testing.assert_array_equal(batch["labels"], targets)
    assert "documents" not in batch  # nothing is padded
    for i in range(COUNT):  # sentinels in the inputs give way to what the targets say of them
        pieces: dict[int, list[int]] = {}
        for token in targets[i, :-1].tolist():
            if token in SPECIALS.sentinels:
                last = pieces.setdefault(token, [])
            else:
                last.append(token)
        back = [t for token in inputs[i, :-1].tolist() for t in pieces.get(token, [token])]
        assert back == raw[i].tolist()


def test_ul2():
    objective, rows = made("ul2")
    batch = objective.collate(rows)
    modes = [SPECIALS.ids[f"mode_{d.mode}"] for d in objective.settings.denoisers]
    which = denoisers.choose(rows["key"], objective.settings.denoisers)
    assert batch["tokens"][:, 0].tolist() == [modes[w] for w in which]
    assert len(set(which.tolist())) == 3
    np.testing.assert_array_equal(batch["documents"] == -1, batch["tokens"] == PAD)
    np.testing.assert_array_equal(
        batch["labels"] == IGNORE, F.pad(batch["targets"], (0, 1), value=PAD)[:, 1:] == PAD
    )


def test_prefix():
    objective, rows = prefix()
    batch = objective.collate(rows)
    for i, cut in enumerate(denoisers.prefix_lengths(rows["key"], rows["tokens"].shape[1] - 1).tolist()):
        row = rows["tokens"][i, :-1].tolist()
        assert batch["tokens"][i][batch["documents"][i] == 0].tolist() == [*row[:cut], END]
        assert spelled(batch, i)[0] == [*row[cut:], END]


def test_pairs():
    objective, rows = made("transformer")
    batch = objective.collate(rows)
    for i in range(COUNT):
        source, target = rows["input_lengths"][i], rows["target_lengths"][i]
        assert batch["tokens"][i][batch["documents"][i] == 0].tolist() == rows["inputs"][i, :source].tolist()
        assert spelled(batch, i)[0] == rows["targets"][i, :target].tolist()


@pytest.mark.parametrize(("name", "smoothing"), [("t5", 0.0), ("ul2", 0.0), ("transformer", 0.1)])
def test_loss_is_torchs(name, smoothing):
    objective, rows = made(name)
    batch = objective.collate(rows)
    out, counts, labels = objective(batch), objective.counts(batch), batch["labels"]
    logits = objective.logits(batch["tokens"], batch["targets"], batch.get("documents"))
    nll = F.cross_entropy(
        logits.flatten(0, 1),
        labels.flatten(),
        ignore_index=IGNORE,
        reduction="sum",
        label_smoothing=smoothing,
    )
    torch.testing.assert_close(out.terms["tokens"], nll, rtol=1e-12, atol=0)
    assert out.metrics["accuracy"].sum == ((logits.argmax(-1) == labels) & (labels != IGNORE)).sum()
    assert out.metrics["accuracy"].over == counts["tokens"] == (labels != IGNORE).sum()
    assert counts["rows"] == COUNT
    assert counts["read"] == batch["tokens"].numel() + batch["targets"].numel()


def test_rows_that_are_not_scored_count_nothing():
    objective, rows = made("ul2")
    real = np.arange(COUNT) % 3 > 0
    batch = objective.collate(rows | {"scored": real})
    part = objective.collate({key: value[real] for key, value in rows.items()})
    assert objective.counts(batch)["tokens"] == objective.counts(part)["tokens"]
    torch.testing.assert_close(
        objective(batch).terms["tokens"], objective(part).terms["tokens"], rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("name", ["ul2", "transformer"])
def test_more_padding_changes_nothing(name):
    """Neither logits of real tokens nor any loss or statistic, those of experts included."""
    objective, rows = made(name)
    batch = objective.collate(rows)
    more = {"tokens": PAD, "targets": PAD, "labels": IGNORE, "documents": -1, "target_documents": -1}
    wider = {k: F.pad(v, (0, 3), value=more[k]) if k in more else v for k, v in batch.items()}
    if name == "ul2":  # rows of each denoiser have their own length
        assert len(set((batch["labels"] != IGNORE).sum(1).tolist())) > 1
    asked = batch["labels"] != IGNORE
    logits = [
        objective.logits(b["tokens"], b["targets"], b["documents"])[:, : asked.shape[1]]
        for b in (batch, wider)
    ]
    torch.testing.assert_close(logits[1][asked], logits[0][asked], rtol=1e-10, atol=1e-12)
    few, many = objective(batch), objective(wider)
    for key, value in few.terms.items():
        torch.testing.assert_close(many.terms[key], value, rtol=1e-12, atol=0)
    for key, mean in few.metrics.items():
        torch.testing.assert_close(many.metrics[key].sum, mean.sum, rtol=1e-12, atol=0)
