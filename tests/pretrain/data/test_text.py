"""Documents out of files of every kind, and what is said of those that are malformed."""

import gzip
import json
import sys
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from headway.pretrain.config import Source
from headway.pretrain.data.corpus import stdlib_sources
from headway.pretrain.data.text import Document, Malformed, cut_into_blocks, find_files, read_documents
from headway.pretrain.errors import DataError

TEXTS = ["first\r\n\tdocument\n", "東京 😀 \0", "x" * 300_000, "last, without a newline"]


def read(path: Path | str, column: str = "text") -> list[Document | Malformed]:
    blocks = cut_into_blocks(find_files(Source(path=str(path), column=column)), column)
    return [item for block in blocks for item in read_documents(block, column)]


def documents(path: Path | str, column: str = "text") -> list[tuple[str, str]]:
    found = read(path, column)
    assert all(isinstance(item, Document) for item in found), found
    return [(item.name, item.text) for item in found if isinstance(item, Document)]


COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_lines(tmp_path: Path, suffix: str) -> None:
    lines = "\n".join(json.dumps({"id": i, "body": text}) for i, text in enumerate(TEXTS))
    lines = lines.replace("\n", "\n\n", 1)  # a blank line counts as a line, and is no document
    (tmp_path / f"a.jsonl{suffix}").write_bytes(COMPRESS[suffix](lines.encode()))
    names = [f"a.jsonl{suffix}:{line}" for line in (1, 3, 4, 5)]
    assert documents(tmp_path / f"a.jsonl{suffix}", "body") == list(zip(names, TEXTS, strict=True))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_texts_in_folders(tmp_path: Path, suffix: str) -> None:
    """Bytes come through as they are, in the order of the names; hidden files stay out."""
    names = [f"b/{i}.txt{suffix}" for i in range(len(TEXTS))]
    for name, text in zip([*names, ".git/config", f"empty{suffix}"], [*TEXTS, "hidden", ""], strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(COMPRESS[suffix](text.encode()) if suffix in name else text.encode())
    assert documents(tmp_path) == list(zip(names, TEXTS, strict=True))


def test_several_members(tmp_path: Path) -> None:
    """Concatenated .gz and .zst files are valid files."""
    for suffix in (".gz", ".zst"):
        (tmp_path / f"a{suffix}").write_bytes(COMPRESS[suffix](b"one ") + COMPRESS[suffix](b"two"))
    assert [text for _, text in documents(tmp_path)] == ["one two"] * 2


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_tables(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [f"row {i}" for i in range(1000)]
    pq.write_table(
        pa.table({"n": range(1000), "body": pa.array(texts, kind)}),
        tmp_path / "a.parquet",
        row_group_size=300,
    )
    assert documents(tmp_path / "a.parquet", "body") == [
        (f"a.parquet:{i + 1}", text) for i, text in enumerate(texts)
    ]


def test_globs_and_names_that_do_not_depend_on_the_machine(tmp_path: Path) -> None:
    for name in ("x/a.txt", "y/a.txt", "y/b.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert documents(f"{tmp_path}/*/*.txt") == [("x/a.txt", "x/a.txt"), ("y/a.txt", "y/a.txt")]
    assert [name for name, _ in documents(f"{tmp_path}/**")] == ["x/a.txt", "y/a.txt", "y/b.md"]
    assert [name for name, _ in documents(f"{tmp_path}/y/b.md")] == ["b.md"]


def test_malformed_lines_are_named(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}',
        b'{"text": "cut',
        b'{"body": "other"}',
        b'{"text": 7}',
        b'["text"]',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
        b'{"text": "also good"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found = read(tmp_path / "a.jsonl")
    assert [item.text for item in found if isinstance(item, Document)] == ["good", "also good"]
    reasons = [
        "not JSON",
        "no field 'text'; the object has 'body'",
        "not a string but int",
        "not a JSON object",
    ]
    reasons += ["not UTF-8", "surrogate", "nested too deeply"]
    malformed = [item for item in found if isinstance(item, Malformed)]
    for line, (item, reason) in enumerate(zip(malformed, reasons, strict=True), 2):
        assert item.where == f"{tmp_path / 'a.jsonl'}:{line}"
        assert reason in item.reason


def test_malformed_lines_keep_their_number_in_later_blocks(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "x" * 1000})] * 999 + ["bad"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    (bad,) = [item for item in read(tmp_path / "a.jsonl") if isinstance(item, Malformed)]
    assert bad.where.endswith("a.jsonl:1000")


def test_malformed_files_and_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    pq.write_table(pa.table({"text": ["one", None, "three"]}), tmp_path / "b.parquet")
    found = read(tmp_path)
    assert [getattr(item, "text", None) for item in found] == [None, "one", None, "three"]
    assert found[0].where == str(tmp_path / "a.txt")
    assert found[2].where == f"{tmp_path / 'b.parquet'}:2"


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.txt.zst", "a.jsonl.zst"])
def test_truncated_compressed_file(tmp_path: Path, name: str) -> None:
    content = COMPRESS[Path(name).suffix](b'{"text": "a"}\n' * 1000)
    (tmp_path / name).write_bytes(content[:-6])
    with pytest.raises(DataError, match=f"{name}: cannot be read"):
        read(tmp_path)


def test_tables_without_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1, 2], "body": ["a", "b"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: no column 'text'; it has id, body"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"a\.parquet: column 'id' holds int64, not text"):
        read(tmp_path, "id")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not at all")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as Parquet"):
        read(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent: no such file"):
        find_files(Source(path=str(tmp_path / "absent")))
    with pytest.raises(DataError, match=r"\*\.jsonl: no file there"):
        find_files(Source(path=f"{tmp_path}/*.jsonl"))
    with pytest.raises(DataError, match="no file there"):
        find_files(Source(path=str(tmp_path)))


def test_standard_library() -> None:
    found = list(stdlib_sources())
    names = [name for _, name in found]
    assert names == sorted(set(names))
    assert {"os.py", "json/decoder.py", "unittest/mock.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert 8e6 < sum(path.stat().st_size for path, _ in found) < 20e6
    assert Path(sysconfig.get_path("stdlib"), "os.py").read_text() == dict(documents("stdlib:"))["os.py"]


def test_no_standard_library(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no Python sources"):
        list(stdlib_sources(tmp_path))
    assert sys.version_info >= (3, 11)
