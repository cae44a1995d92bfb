"""Held-out rows: every token of the store is scored exactly once."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headway.pretrain.data.heldout import HeldoutRows, heldout_rows
from headway.pretrain.errors import DataError, JobError

END = 0


class CountingStore:
    """Tokens 1, 2, 3, ...: a token tells its place. Every `every`-th is a separator, if given."""

    def __init__(self, tokens, every=None):
        self.tokens = tokens
        self.stream = np.arange(1, tokens + 1)
        if every:
            self.stream[every - 1 :: every] = END
        self.begins = np.arange(0, tokens, every or max(tokens, 1))

    def read(self, start, count):
        assert 0 <= start <= start + count <= self.tokens
        return self.stream[start : start + count]

    def boundaries(self, start, stop):
        return self.begins[(self.begins >= start) & (self.begins < stop)]


@given(
    tokens=st.integers(1, 200),
    seq_len=st.integers(1, 40),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.9]),
    batch=st.integers(1, 5),
)
@example(tokens=20, seq_len=10, overlap=0.0, batch=1)
@example(tokens=21, seq_len=10, overlap=0.0, batch=1)
@settings(max_examples=200, deadline=None)
def test_every_token_is_scored_once(tokens, seq_len, overlap, batch):
    labels, sizes = [], []
    for rows in heldout_rows(CountingStore(tokens), seq_len, END, overlap, batch=batch):
        assert rows["tokens"].shape == (len(rows["scored"]), seq_len + 1) == rows["documents"].shape
        assert rows["scored"].shape == (len(rows["documents"]), seq_len)
        assert rows["scored"].any(axis=1).all()
        labels += rows["tokens"][:, 1:][rows["scored"]].tolist()
        sizes.append(len(rows["scored"]))
    assert labels == list(range(1, tokens + 1))
    assert sum(sizes) == len(HeldoutRows(CountingStore(tokens), seq_len, END, overlap))
    assert all(size == batch for size in sizes[:-1])


def test_overlap_gives_every_label_its_context():
    heldout = HeldoutRows(CountingStore(100), 10, END, overlap=0.5)
    rows = heldout.rows(np.arange(len(heldout)))
    assert rows["scored"][0].all()
    assert not rows["scored"][1:, :5].any()
    assert np.array_equal(rows["tokens"][1:, 0], np.arange(5, 95, 5)[: len(heldout) - 1])


def test_the_first_token_follows_a_separator_and_padding_is_alone():
    rows = HeldoutRows(CountingStore(3), 6, END).rows([0])
    assert rows["tokens"].tolist() == [[END, 1, 2, 3, END, END, END]]
    assert rows["scored"].tolist() == [[True, True, True, False, False, False]]
    assert rows["documents"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]


@given(tokens=st.integers(1, 100), every=st.integers(1, 12), seq_len=st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_documents_begin_at_separators(tokens, every, seq_len):
    store = CountingStore(tokens, every)
    heldout = HeldoutRows(store, seq_len, END)
    rows = heldout.rows(np.arange(len(heldout)))
    stream = np.concatenate([[END], store.stream])  # the separator in front
    for i in range(len(heldout)):
        part = stream[i * seq_len : i * seq_len + seq_len + 1]
        expected = np.cumsum(part == END) - (part[0] == END)
        assert np.array_equal(rows["documents"][i, : part.size], expected)
        assert (rows["documents"][i, part.size :] == expected[-1] + 1).all()


def test_bad_overlap_empty_store_and_foreign_tokens_are_refused():
    with pytest.raises(JobError, match=r"overlap = 1\.0"):
        HeldoutRows(CountingStore(10), 4, END, overlap=1.0)
    with pytest.raises(DataError, match="docs: holds no tokens"):
        HeldoutRows(CountingStore(0), 4, END, name="docs")
    with pytest.raises(DataError, match="docs: token 8 at offset 7 is not in the vocabulary of 8"):
        HeldoutRows(CountingStore(10), 4, END, vocab=8, name="docs").rows([0, 1, 2])
