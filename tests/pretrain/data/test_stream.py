"""Rows, cursor and ranks of the sample stream."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.pretrain.data.stream import SampleStream, rank_slots
from headway.pretrain.data.token_rows import TokenRows, document_ids
from headway.pretrain.errors import DataError

END = 0


class MemoryStore:
    """A token store in memory, from documents that end with a separator."""

    def __init__(self, documents):
        self.begins = np.cumsum([0] + [len(d) for d in documents])[:-1].astype(np.int64)
        self.stream = np.concatenate([np.asarray(d, dtype=np.uint16) for d in documents])
        self.tokens, self.documents = self.stream.size, len(documents)

    def read(self, start, count):
        assert 0 <= start <= start + count <= self.tokens
        return self.stream[start : start + count]

    def boundaries(self, start, stop):
        assert 0 <= start <= stop <= self.tokens
        return self.begins[(self.begins >= start) & (self.begins < stop)]


def counting_store(tokens):
    """One document whose tokens are 1, 2, 3, ...: a token tells its place."""
    return MemoryStore([np.arange(1, tokens + 1)])


def stream(sources=(("a", 101, 1.0),), seq_len=10, seed=0, **options):
    rows = [(n, TokenRows(counting_store(t), seq_len, END, name=n, **options), w) for n, t, w in sources]
    return SampleStream(rows, seed)


def test_an_epoch_predicts_every_token_once_but_the_first():
    rows = stream().rows(np.arange(10))
    assert rows["tokens"].shape == (10, 11)
    assert rows["tokens"].dtype == np.int64
    assert sorted(rows["tokens"][:, 1:].ravel()) == list(range(2, 102))
    assert np.array_equal(rows["tokens"][:, :-1] + 1, rows["tokens"][:, 1:])
    assert np.array_equal(rows["sample"], np.arange(10))


def test_keys_are_those_of_the_rows_and_read_nothing():
    blend = stream([("a", 101, 1.0), ("b", 71, 2.0)], seed=3)
    draws = np.array([40, 0, 7, 25])
    keys = blend.rows(draws)["key"]
    blend.samples = [None, None]
    assert np.array_equal(blend.keys(draws), keys)


@pytest.mark.parametrize(("tokens", "rows"), [(11, 1), (20, 1), (21, 2), (101, 10), (110, 10)])
def test_the_last_partial_row_is_dropped(tokens, rows):
    labels = stream([("a", tokens, 1.0)]).rows(np.arange(rows))["tokens"][:, 1:]
    assert sorted(labels.ravel()) == list(range(2, rows * 10 + 2))


def test_epochs_are_shuffled_anew():
    first = stream().rows(np.arange(30))["tokens"][:, 0].reshape(3, 10)
    assert all(sorted(epoch) == sorted(first[0]) for epoch in first)
    assert len({tuple(epoch) for epoch in first}) == 3


def test_the_order_depends_on_seed_and_name_alone():
    draws = np.arange(20)
    base = stream().rows(draws)["tokens"]
    assert np.array_equal(base, stream().rows(draws)["tokens"])
    assert not np.array_equal(base, stream(seed=1).rows(draws)["tokens"])
    assert not np.array_equal(base, stream([("b", 101, 1.0)]).rows(draws)["tokens"])


def test_rows_may_be_asked_for_in_any_order():
    s = stream([("a", 101, 2.0), ("b", 57, 1.0)])
    draws = np.random.default_rng(0).permutation(60)
    whole, mixed = s.rows(np.arange(60)), s.rows(draws)
    assert all(np.array_equal(whole[key][draws], mixed[key]) for key in whole)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 12])
def test_the_global_batch_is_the_same_on_any_number_of_ranks(ranks):
    s = stream([("a", 101, 2.0), ("b", 57, 1.0)])
    parts = [s.batch(24, 12, rank, ranks) for rank in range(ranks)]
    whole = s.rows(np.arange(24, 36))
    for key in whole:
        assert np.array_equal(np.concatenate([p[key] for p in parts]), whole[key])
    assert np.concatenate([p["slot"] for p in parts]).tolist() == list(range(12))


@given(size=st.integers(0, 100), ranks=st.integers(1, 17))
def test_slots_are_a_partition_and_even(size, ranks):
    slots = [rank_slots(size, rank, ranks) for rank in range(ranks)]
    assert [i for part in slots for i in part] == list(range(size))
    assert max(map(len, slots)) - min(map(len, slots)) <= 1


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20),
    start=st.integers(0, 40),
    size=st.integers(1, 40),
)
@settings(max_examples=200, deadline=None)
def test_a_separator_is_the_first_token_of_the_next_document(lengths, start, size):
    store = MemoryStore([[1] * (n - 1) + [END] for n in lengths])
    start %= store.tokens
    tokens = store.read(start, min(size, store.tokens - start)).astype(np.int64)
    separators = np.cumsum(tokens == END)
    assert np.array_equal(document_ids(store, start, tokens, END), separators - (tokens[0] == END))


def test_documents_without_separators_begin_at_their_first_token():
    store = MemoryStore([[1, 2, 3], [4, 5], [6, 7, 8]])
    assert document_ids(store, 0, store.stream.astype(np.int64), END).tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert document_ids(store, 3, store.stream[3:].astype(np.int64), END).tolist() == [0, 0, 1, 1, 1]


def test_a_separator_inside_a_document_does_not_end_it():
    store = MemoryStore([[1, END, 3, END], [4, END]])
    assert document_ids(store, 0, store.stream.astype(np.int64), END).tolist() == [0, 0, 0, 1, 1, 2]


def test_describe_names_source_row_and_epoch():
    s = stream([("corpus.jsonl", 101, 1.0)])
    row = (s.rows([12])["tokens"][0, 0] - 1) // 10
    assert s.describe(12) == f"corpus.jsonl row {row} (epoch 1)"


def test_the_cursor_goes_through_json_and_resumes_exactly():
    s = stream([("a", 101, 2.0), ("b", 57, 1.0)])
    s.draw = 17
    again = stream([("a", 101, 2.0), ("b", 57, 1.0)])
    assert again.load(json.loads(json.dumps(s.state(), sort_keys=True))) == []
    assert again.state() == s.state()
    assert np.array_equal(again.rows(np.arange(17, 40))["tokens"], s.rows(np.arange(17, 40))["tokens"])


SETS = {
    "reweighted": [("a", 101, 1.0), ("b", 201, 5.0)],
    "reordered": [("b", 201, 1.0), ("a", 101, 2.0)],
    "one more": [("a", 101, 2.0), ("b", 201, 1.0), ("c", 301, 3.0)],
    "one less": [("b", 201, 1.0)],
}


@pytest.mark.parametrize("change", SETS)
def test_a_changed_blend_loses_and_repeats_nothing(change):
    plain = [("a", 101, 2.0), ("b", 201, 1.0)]
    taken: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    state = None
    for sources, stop in ((plain, 8), (SETS[change], 14), (plain, 21)):
        s = stream(sources)
        if state:
            assert bool(s.load(json.loads(json.dumps(state))))
        draws = np.arange(s.draw, stop)
        for name, token in zip(s.locate(draws)[0], s.rows(draws)["tokens"][:, 0], strict=True):
            taken[s.names[name]].append(int(token))
        s.draw = stop
        state = s.state()
    for name, tokens in (("a", 101), ("b", 201)):
        index = np.arange(len(taken[name]))
        assert taken[name] == stream([(name, tokens, 1.0)]).rows(index)["tokens"][:, 0].tolist()


def test_a_change_is_told():
    s = stream([("a", 101, 2.0), ("b", 201, 1.0)])
    s.draw = 5
    notes = stream([("a", 101, 3.0), ("c", 201, 1.0)]).load(s.state())
    assert notes == ["a: weight 2 -> 3", "b: gone from the blend", "c: new in the blend"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 1}, "train.seed = 1.*saved with 0"),
        ({"seq_len": 5}, "data.seq_len = 5.*saved with 10"),
        ({"sources": [("a", 102, 1.0)]}, "a: holds 102 tokens, but 101"),
    ],
)
def test_a_cursor_of_another_order_is_refused(options, words):
    state = stream().state()
    with pytest.raises(DataError, match=words):
        stream(**options).load(state)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sources": [("a", 10, 1.0)]}, "a: holds 10 tokens.*data.seq_len = 10 needs 11"),
        ({"sources": [("a", 101, 1.0), ("a", 101, 1.0)]}, "one name"),
        ({"sources": [("a", 101, 0.0)]}, "positive"),
        ({"sources": []}, "data.sources"),
    ],
)
def test_sources_that_cannot_be_read_are_refused(options, words):
    with pytest.raises(DataError, match=words):
        stream(**options)


def test_tokens_outside_the_vocabulary_name_store_and_offset():
    s = stream([("a", 101, 1.0)], vocab=50)
    with pytest.raises(
        DataError, match=r"a: token (\d+) at offset (\d+) is not in the vocabulary of 50"
    ) as error:
        s.rows(np.arange(10))
    words = str(error.value).split()
    assert int(words[2]) == int(words[5]) + 1  # this store's token at offset i is i + 1
    assert stream([("a", 101, 1.0)], vocab=102).rows(np.arange(10))["tokens"].max() == 101
