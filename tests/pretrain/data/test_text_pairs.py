"""Text pairs: rows against the texts that went in, from JSONL and Parquet through aligned stores."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.pretrain.config import Data, Source, Tokenizer
from headway.pretrain.data.build import prepare_data
from headway.pretrain.data.store import TokenStore, TokenStoreWriter
from headway.pretrain.data.text_pairs import NAMED, TextPairs
from headway.pretrain.errors import DataError

END, PAD = 256, 257


def write(prefix, texts):
    with TokenStoreWriter(prefix, 260) as writer:
        for text in texts:
            writer.add([*text, END])
    return TokenStore(prefix)


@pytest.fixture
def open_pairs(tmp_path):
    def open_pairs(sources, targets, seq_len, target_len, **options):
        stores = write(tmp_path / "s", sources), write(tmp_path / "s.target", targets)
        return TextPairs(*stores, seq_len, target_len, END, PAD, "corpus", **options)

    return open_pairs


def expected_row(text, width):
    return [*text, END] + [PAD] * (width - len(text) - 1)


@settings(deadline=None, max_examples=50)
@given(
    pairs=st.lists(
        st.tuples(st.binary(min_size=1, max_size=12), st.binary(min_size=1, max_size=12)), max_size=40
    ),
    seq_len=st.integers(1, 14),
    target_len=st.integers(1, 14),
)
def test_rows_against_the_texts(tmp_path_factory, pairs, seq_len, target_len):
    """Every pair that fits is a row, whole and once; every other one is counted, and the first are named."""
    folder = tmp_path_factory.mktemp("pairs")
    stores = [write(folder / f"s{i}", [pair[i] for pair in pairs]) for i in (0, 1)]
    fits = [pair for pair in pairs if len(pair[0]) < seq_len and len(pair[1]) < target_len]
    if not fits:
        with pytest.raises(
            DataError, match=rf"corpus: no pair .*data\.seq_len = {seq_len} .*of {len(pairs)} pairs"
        ):
            TextPairs(*stores, seq_len, target_len, END, PAD, "corpus")
        return
    samples = TextPairs(*stores, seq_len, target_len, END, PAD, "corpus")
    assert len(samples) == len(fits)
    assert samples.left_out == len(pairs) - len(fits)
    assert len(samples.left_out_first) == min(NAMED, samples.left_out)
    rows = samples.rows(np.arange(len(fits)), np.zeros(len(fits), np.int64))
    assert rows["inputs"].tolist() == [expected_row(source, seq_len) for source, _ in fits]
    assert rows["targets"].tolist() == [expected_row(target, target_len) for _, target in fits]
    assert rows["input_lengths"].tolist() == [len(source) + 1 for source, _ in fits]
    assert rows["target_lengths"].tolist() == [len(target) + 1 for _, target in fits]
    assert {array.dtype.name for array in rows.values()} == {"int64"}


def test_rows_come_in_the_order_that_is_asked_for(open_pairs):
    samples = open_pairs([b"a", b"bbbbbb", b"c", b"d"], [b"A", b"B", b"C", b"D"], 4, 4)
    rows = samples.rows(np.array([2, 0, 2]), np.zeros(3, np.int64))
    assert rows["inputs"][:, 0].tolist() == list(b"dad")
    assert rows["targets"][:, 0].tolist() == list(b"DAD")
    assert samples.left_out_first == ["corpus pair 1: 7 and 2 tokens, of at most 4 and 4"]
    assert samples.rows(np.zeros(0, np.int64), np.zeros(0, np.int64))["inputs"].shape == (0, 4)


def test_identity_and_errors(open_pairs):
    identity = open_pairs([b"ab", b"c"], [b"d", b"efg"], 8, 9).identity
    assert identity == {"tokens": 5, "target_tokens": 6, "seq_len": 8, "target_len": 9}
    with pytest.raises(DataError, match="corpus: holds 1 sources and 2 targets, which are not pairs"):
        open_pairs([b"a"], [b"b", b"c"], 8, 8)
    with pytest.raises(DataError, match=r"no pair .*the shortest sides have 3 and 2 tokens;"):
        open_pairs([b"ab", b"cde"], [b"f", b"g"], 2, 2)
    samples = open_pairs([b"ab"], [b"cd"], 8, 8, vocab=100)
    with pytest.raises(
        DataError, match="corpus, target of pair 0: token 100 at offset 1 is not in the vocabulary"
    ):
        samples.rows(np.zeros(1, np.int64), np.zeros(1, np.int64))


@pytest.mark.parametrize("form", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_from_files_to_rows(tmp_path, form):
    """Both sides of a pair are on one side of the split, in one order."""
    pairs = [{"id": i, "en": f"number {i}", "de": f"Zahl {i * i} é"} for i in range(300)]
    if form == "a.parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(pairs), tmp_path / form)
    else:
        text = "".join(json.dumps(pair) + "\n" for pair in pairs).encode()
        if form.endswith(".gz"):
            import gzip

            text = gzip.compress(text)
        (tmp_path / form).write_bytes(text)
    source = Source(path=str(tmp_path / form), column="en", target="de")
    data = Data(
        sources=[source], heldout=0.2, cache=str(tmp_path / "cache"), tokenizer=Tokenizer(kind="bytes")
    )
    prepared = prepare_data(data, progress=False)
    (train, _), (heldout,) = prepared.train[0], prepared.heldout
    (train_target,), (heldout_target,) = prepared.train_targets, prepared.heldout_targets
    seen = []
    for prefixes in ((train, train_target), (heldout, heldout_target)):
        samples = TextPairs(*map(TokenStore, prefixes), 32, 32, END, PAD, "corpus")
        rows = samples.rows(np.arange(len(samples)), np.zeros(len(samples), np.int64))
        assert len(samples) > 20
        for x, n, y, m in zip(
            rows["inputs"], rows["input_lengths"], rows["targets"], rows["target_lengths"], strict=True
        ):
            source_text, target_text = (bytes(t[: k - 1].tolist()).decode() for t, k in ((x, n), (y, m)))
            number = int(source_text.removeprefix("number "))
            assert target_text == f"Zahl {number * number} é"
            seen.append(number)
    assert sorted(seen) == list(range(300))
