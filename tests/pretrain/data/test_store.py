"""The token store against Megatron-Core's IndexedDataset, in both directions, and damage to its files."""

import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.pretrain.data.store import TokenStore, TokenStoreWriter, check_tokenizer, part, summary
from headway.pretrain.data.tokenizer import BytesTokenizer
from headway.pretrain.errors import DataError

megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")


def write(prefix: Path, documents: list[list[int]], vocab: int = 260) -> Path:
    with TokenStoreWriter(prefix, vocab) as writer:
        for tokens in documents:
            writer.add(tokens)
    return prefix


DOCUMENTS = [[1, 2, 3, 256], [256], [4, 5, 256], list(range(200)), [7]]


@pytest.mark.parametrize("vocab", [260, 65499, 65500, 300_000])
def test_megatron_reads_ours(tmp_path: Path, vocab: int) -> None:
    prefix = write(tmp_path / "a.b", DOCUMENTS, vocab)
    theirs = megatron.IndexedDataset(str(prefix))
    assert theirs.index.dtype == megatron.DType.optimal_dtype(vocab)
    assert [each.tolist() for each in theirs[:]] == DOCUMENTS
    assert theirs.document_indices.tolist() == list(range(len(DOCUMENTS) + 1))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint8])
def test_files_equal_megatrons(tmp_path: Path, dtype: type) -> None:
    """Byte for byte for the dtypes that we write; all are read."""
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for tokens in DOCUMENTS:
        builder.add_document(torch.tensor(np.array(tokens).astype(dtype).astype(np.int64)), [len(tokens)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    store = TokenStore(tmp_path / "theirs")
    assert store.dtype == dtype
    assert [store.document(i).tolist() for i in range(5)] == [
        np.array(d).astype(dtype).tolist() for d in DOCUMENTS
    ]
    if dtype is not np.uint8:
        write(tmp_path / "ours", DOCUMENTS, 260 if dtype is np.uint16 else 100_000)
        for suffix in (".bin", ".idx"):
            assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_documents_of_several_sequences_and_of_none(tmp_path: Path) -> None:
    """Megatron may split a document into sentences, and may hold empty documents."""
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "s.bin"), dtype=np.uint16)
    builder.add_document(torch.tensor([1, 2, 3, 4, 5]), [2, 3])
    builder.end_document()
    builder.add_document(torch.tensor([6, 7]), [1, 1])
    builder.end_document()
    builder.finalize(str(tmp_path / "s.idx"))
    store = TokenStore(tmp_path / "s")
    assert (store.tokens, store.documents) == (7, 4)
    assert [store.document(i).tolist() for i in range(4)] == [[1, 2, 3, 4, 5], [], [6, 7], []]
    assert store.boundaries(0, 7).tolist() == [0, 5]
    assert store.boundaries(1, 100).tolist() == [5]


@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=30), data=st.data())
def test_reading_against_numpy(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], data: st.DataObject
) -> None:
    stream = np.arange(sum(lengths)) % 251
    begins = np.cumsum([0, *lengths])
    documents = np.split(stream, begins[1:-1])
    store = TokenStore(write(tmp_path_factory.mktemp("s") / "s", [each.tolist() for each in documents]))
    assert (store.tokens, store.documents) == (stream.size, len(lengths))
    start = data.draw(st.integers(0, stream.size))
    stop = data.draw(st.integers(start, stream.size))
    assert np.array_equal(store.read(start, stop - start), stream[start:stop])
    expected = begins[:-1][(begins[:-1] >= start) & (begins[:-1] < stop)]
    found = store.boundaries(start, stop)
    assert found.dtype == np.int64
    assert np.array_equal(found, expected)
    i = data.draw(st.integers(0, len(lengths) - 1))
    assert np.array_equal(store.document(i), documents[i])


def test_views_ranges_and_pickles(tmp_path: Path) -> None:
    store = pickle.loads(pickle.dumps(TokenStore(write(tmp_path / "s", DOCUMENTS))))
    row = store.read(2, 4)
    assert row.tolist() == [3, 256, 256, 4]
    assert not row.flags.writeable
    assert not row.flags.owndata
    for start, count in [(-1, 2), (0, store.tokens + 1), (store.tokens, 1), (0, -1)]:
        with pytest.raises(IndexError):
            store.read(start, count)
    for i in (-1, 5):
        with pytest.raises(IndexError):
            store.document(i)


def test_empty_store(tmp_path: Path) -> None:
    store = TokenStore(write(tmp_path / "s", []))
    assert (store.tokens, store.documents, store.read(0, 0).size, store.boundaries(0, 5).size) == (0, 0, 0, 0)


def test_a_store_of_a_trillion_tokens(tmp_path: Path) -> None:
    """1e9 documents of 1,000 tokens in sparse files: only the pages that are touched exist."""
    documents, length = 10**9, 1000
    with (tmp_path / "big.idx").open("wb") as index:
        index.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, documents, documents + 1))
        index.truncate(34 + 12 * documents + 8 * (documents + 1))
        index.seek(34 + 4 * (documents - 1))
        index.write(struct.pack("<i", length))
        index.seek(34 + 12 * documents - 8)
        index.write(struct.pack("<q", 2 * length * (documents - 1)))
        index.seek(34 + 12 * documents + 8 * documents)
        index.write(struct.pack("<q", documents))
    with (tmp_path / "big.bin").open("wb") as tokens:
        tokens.truncate(2 * length * documents)
    store = TokenStore(tmp_path / "big")
    assert (store.tokens, store.documents) == (10**12, 10**9)
    assert store.read(10**12 - 3, 3).tolist() == [0, 0, 0]


def damaged(name: str, prefix: Path) -> None:
    index, tokens = part(prefix, ".idx"), part(prefix, ".bin")
    content = index.read_bytes()
    match name:
        case "no bin":
            tokens.unlink()
        case "no idx":
            index.unlink()
        case "truncated bin":
            tokens.write_bytes(tokens.read_bytes()[:-1])
        case "empty bin":
            tokens.write_bytes(b"")
        case "bin of another":
            tokens.write_bytes(tokens.read_bytes() + b"\0\0")
        case "truncated idx":
            index.write_bytes(content[:-3])
        case "stump of idx":
            index.write_bytes(content[:20])
        case "magic":
            index.write_bytes(b"X" + content[1:])
        case "dtype":
            index.write_bytes(content[:17] + b"\x07" + content[18:])
        case "documents":
            index.write_bytes(content[:-8] + struct.pack("<q", 99))
        case "sidecar of another":
            part(prefix, ".json").write_text(json.dumps({"tokens": 1, "documents": 1}))
        case "sidecar":
            part(prefix, ".json").write_text("[")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no bin", r"s\.bin: the file does not exist"),
        ("no idx", r"s\.idx: the file does not exist"),
        ("truncated bin", r"s\.bin: truncated.*417 bytes, the \.idx says 418"),
        ("empty bin", r"s\.bin: truncated"),
        ("bin of another", r"s\.bin: the \.idx belongs to another \.bin"),
        ("truncated idx", r"s\.idx: truncated"),
        ("stump of idx", r"s\.idx: truncated: 20 bytes"),
        ("magic", r"s\.idx: not the index of a token store"),
        ("dtype", r"s\.idx: unknown dtype 7"),
        ("documents", r"s\.idx: not an index"),
        ("sidecar of another", r"s\.json: belongs to another store"),
        ("sidecar", r"s\.json: not the sidecar"),
    ],
)
def test_damage_is_named(tmp_path: Path, name: str, message: str) -> None:
    damaged(name, write(tmp_path / "s", DOCUMENTS))
    with pytest.raises(DataError, match=message):
        TokenStore(tmp_path / "s")


def test_store_of_another_tokenizer(tmp_path: Path) -> None:
    tokenizer = BytesTokenizer()
    with TokenStoreWriter(tmp_path / "s", 260) as writer:
        writer.add([1, 256])
        writer.close(digest=tokenizer.digest, vocab=260, separator=256, utf8_bytes=1, skipped=0)
    check_tokenizer(TokenStore(tmp_path / "s"), tokenizer)
    assert summary(tmp_path / "s")["bytes_per_token"] == 0.5
    facts = json.loads((tmp_path / "s.json").read_text())
    (tmp_path / "s.json").write_text(json.dumps(facts | {"digest": "0" * 64}))
    with pytest.raises(DataError, match="written with a tokenizer of 260 ids"):
        check_tokenizer(TokenStore(tmp_path / "s"), tokenizer)
    foreign = write(tmp_path / "f", [[1, 2], [50_000, 3]], 65_000)
    part(foreign, ".json").unlink()
    with pytest.raises(DataError, match="holds the id 50000"):
        check_tokenizer(TokenStore(foreign), tokenizer)
