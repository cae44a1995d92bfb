"""The ledger: what ranks used, told step by step, and the proof that no sample is lost or repeated."""

import copy
import json

import numpy as np
import pytest
import torch

from headway.pretrain.config import Train
from headway.pretrain.data.ledger import Ledger, order_of
from headway.pretrain.data.ledger_check import Counted, check
from headway.pretrain.data.ramp import BatchSizes
from headway.pretrain.data.stream import SampleStream
from headway.pretrain.data.used import Used, from_sums, shares
from headway.pretrain.errors import LedgerError
from headway.pretrain.records.metrics import read_metrics

SOURCES = (("a", 23, 2.0), ("b", 11, 1.0))


class Numbers:
    """Samples that are nothing but numbers."""

    def __init__(self, size):
        self.size, self.identity = size, {"rows": size}

    def __len__(self):
        return self.size

    def rows(self, indices, keys):
        return {"number": indices}


def stream(sources=SOURCES, seed=0):
    return SampleStream([(name, Numbers(size), weight) for name, size, weight in sources], seed)


def batch_of(s, draws):
    return {name: torch.from_numpy(array) for name, array in s.rows(draws).items()}


def used_by(s, draws, ranks=1):
    """What some ranks find in their parts of a global batch."""
    batch = batch_of(s, np.asarray(draws))
    parts = [shares({k: v[r::ranks] for k, v in batch.items()}) for r in range(ranks)]
    return from_sums({name: float(sum(part[name] for part in parts)) for name in parts[0]})


def write(folder, lives, train=None):
    """A ledger of several lives of a run: (sources, step to begin after, steps, ranks) each.

    As in a run, a life goes on from the cursor that was saved after the step it begins with.
    """
    train = train or Train(global_batch=6)
    sizes, saved = BatchSizes(train), {}
    for sources, begin, steps, ranks in lives:
        s = stream(sources)
        if begin:
            s.load(json.loads(json.dumps(saved[begin])))
        ledger = Ledger(folder, begin, order_of(s, train), pytest.fail)
        for step in range(begin + 1, begin + steps + 1):
            rows = sizes.rows(sizes.step_of(s.draw))
            ledger.step(step, used_by(s, range(s.draw, s.draw + rows), ranks))
            s.draw += rows
            saved[step] = s.state()
        ledger.close()
    return read_metrics(folder / "ledger.jsonl")


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_sums_over_ranks_are_those_of_the_whole_batch(ranks):
    s = stream()
    draws = np.arange(30) + (1 << 40)  # beyond 32 bits, which the sums are cut into
    batch = batch_of(s, draws)
    keys = batch["key"].tolist()
    assert min(keys) < 0 < max(keys)
    assert used_by(s, draws, ranks) == Used(30, sum(draws.tolist()), sum(keys) % 2**64)


def test_batches_without_keys_have_no_record():
    assert shares({"sample": torch.arange(3)}) == {}
    assert from_sums({"tokens": 3.0}) is None


def test_a_clean_run_is_proved(tmp_path):
    proof = check(write(tmp_path, [(SOURCES, 0, 30, 2)]))
    assert proof.starts == [1]
    assert proof.ends == list(range(6, 186, 6))
    assert {n: (s.size, s.used) for n, s in proof.sources.items()} == {"a": (23, 120), "b": (11, 60)}
    assert check(read_metrics(tmp_path / "ledger.jsonl"), {n: Counted(k, {"rows": k}) for n, k, _ in SOURCES})


def test_steps_lost_to_a_kill_are_replaced_and_layouts_may_change(tmp_path):
    proof = check(write(tmp_path, [(SOURCES, 0, 13, 1), (SOURCES, 10, 7, 3), (SOURCES, 15, 10, 2)]))
    assert proof.starts == [1, 11, 16]
    assert len(proof.ends) == 25


def test_a_growing_batch(tmp_path):
    train = Train(global_batch=12, ramp={"start": 4, "increment": 4, "samples": 40})
    proof = check(write(tmp_path, [(SOURCES, 0, 7, 1), (SOURCES, 5, 12, 4)], train))
    assert proof.ends == [BatchSizes(train).first(step) for step in range(1, 18)]


CHANGES = {
    "weights": (("a", 23, 1.0), ("b", 11, 5.0)),
    "order": (("b", 11, 1.0), ("a", 23, 2.0)),
    "one more": (*SOURCES, ("c", 5, 1.0)),
    "one less": (("b", 11, 1.0),),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_blend_that_changes_loses_and_repeats_nothing(tmp_path, change):
    rows = write(tmp_path, [(SOURCES, 0, 9, 1), (CHANGES[change], 7, 8, 2), (SOURCES, 12, 10, 1)])
    proof = check(rows)
    assert proof.starts == [1, 8, 13]
    assert sum(source.used for source in proof.sources.values()) == 22 * 6


def test_many_steps_are_checked_in_blocks(tmp_path, monkeypatch):
    rows = write(tmp_path, [(SOURCES, 0, 40, 1)])
    monkeypatch.setattr("headway.pretrain.data.ledger_check.BLOCK", 20)
    assert check(rows) == check(read_metrics(tmp_path / "ledger.jsonl"))
    rows[33]["digest"] = rows[32]["digest"]
    with pytest.raises(LedgerError, match="step 34 did not use"):
        check(rows)


@pytest.fixture
def rows(tmp_path):
    """A ledger of twelve steps and two lives."""
    return write(tmp_path, [(SOURCES, 0, 8, 2), (SOURCES, 8, 4, 1)])


def put(rows, step, draws):
    """Have a step use other samples than its own."""
    found = used_by(stream(), draws)
    rows[step - 1] |= {"rows": found.rows, "draws": found.draws, "digest": f"{found.digest:016x}"}


FAULTS = {
    "the step before again": (5, range(18, 24), r"lost were draws 24 to 29: .*; used beyond .* 18 to 23: "
                              r".*, which step 4 had used"),
    "a step ahead": (5, range(30, 36), r"lost were draws 24 to 29.* 30 to 35: .*, whose turn comes later"),
    "one row less": (5, [24, 25, 27, 28, 29], r"lost were draws 26 to 26: [ab] row \d+ \(epoch \d\)$"),
    "the last row less": (5, range(24, 29), "lost were draws 29 to 29"),
    "one row more": (5, range(24, 31), "used beyond its turn were draws 30 to 30.*later"),
    "a row twice": (5, [24, 25, 26, 27, 28, 28], "lost were draws 29 to 29.*28 to 28.*, which it used twice"),
    "a rank read another's rows": (5, [24, 25, 26, 24, 25, 26], r"lost were draws 27 to 29.* 24 to 26: .*twice"),
    "the first rows again": (2, [0, 1, 8, 9, 10, 11], r"lost were draws 6 to 7: .* draws 0 to 1: .*step 1 had"),
    "scattered": (5, [24, 25, 40, 27, 50, 29], "6 others were used, or its record was changed"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_lost_and_repeated_samples_are_named(rows, fault):
    step, draws, words = FAULTS[fault]
    put(rows, step, draws)
    with pytest.raises(LedgerError, match=rf"^step {step} did not use the samples of its turn.*{words}"):
        check(rows)


def test_a_repeated_and_a_lost_record_are_named(rows):
    with pytest.raises(LedgerError, match="step 5 has no record: the ledger goes on with step 6"):
        check(rows[:4] + rows[5:])
    with pytest.raises(LedgerError, match="step 6 has no record: the ledger goes on with step 5"):
        check([*rows[:5], *rows[4:]])
    with pytest.raises(LedgerError, match="step 1 has no record"):
        check(rows[1:])


def test_a_changed_record_is_named(rows):
    for field in ("rows", "draws", "digest"):
        changed = copy.deepcopy(rows)
        value = changed[6][field]
        changed[6][field] = value + 1 if field != "digest" else f"{int(value, 16) ^ 4:016x}"
        with pytest.raises(LedgerError, match=r"^step 7 did not use"):
            check(changed)
        changed[6][field] = None
        with pytest.raises(LedgerError, match=r"^step 7 has a damaged record"):
            check(changed)


def test_the_first_of_two_faults_is_named(rows):
    put(rows, 5, range(18, 24))
    with pytest.raises(LedgerError, match=r"^step 5 "):
        check(rows[:6] + rows[7:])


def change(rows, **values):
    rows[8]["order"] |= values
    return rows


def test_a_start_at_another_place_is_named(rows):
    assert rows[8]["order"]["draw"] == 48
    with pytest.raises(LedgerError, match="step 9 goes on at draw 50: draws 48 to 49 were never used"):
        check(change(rows, draw=50))
    with pytest.raises(LedgerError, match="step 9 goes on at draw 42: draws 42 to 47 are used a second time"):
        check(change(rows, draw=42))
    with pytest.raises(LedgerError, match="step 9 goes on with seed 1"):
        check(change(rows, draw=48, seed=1))


def test_a_source_that_does_not_go_on_where_it_was_is_named(rows):
    sources = copy.deepcopy(rows[8]["order"]["sources"])
    for consumed, words in ((34, "34 of a, .* never used"), (30, "30 of a, .* used again"), (32, "")):
        sources[0]["consumed"], sources[1]["consumed"] = consumed, 16
        changed = change(copy.deepcopy(rows), start=48, sources=sources)
        if words:
            with pytest.raises(LedgerError, match=rf"^step 9 goes on at sample {words}"):
                check(changed)
    sources[0]["size"] = 24
    with pytest.raises(LedgerError, match=r"step 9 read a with 24 samples .*when the run began with it"):
        check(change(rows, start=48, sources=sources))


def test_data_that_is_no_longer_the_same_is_named(rows):
    with pytest.raises(LedgerError, match=r"step 1 read b with 11 samples .*today it had 12 samples"):
        check(rows, {"b": Counted(12, {"rows": 12})})
    with pytest.raises(LedgerError, match="damaged order"):
        check(change(rows, ramp={"start": "x"}))


def test_a_full_disk_is_told_once_and_loses_no_line(tmp_path, monkeypatch):
    said = []
    ledger = Ledger(tmp_path, 0, order_of(stream(), Train()), said.append)

    def full(row):
        ledger_write(row)
        raise OSError(28, "No space left on device")

    ledger_write = ledger._file.write
    monkeypatch.setattr(ledger._file, "write", full)
    for step in (1, 2):
        ledger.step(step, used_by(stream(), range(3)))
    assert said == ["ledger.jsonl: No space left on device; its latest lines wait for the next step"]
