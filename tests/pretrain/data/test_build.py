"""Building stores: the split, any number of workers, the cache, faults, and what is passed through."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from headway.pretrain.config import Data, Source, Tokenizer
from headway.pretrain.data import build, workers
from headway.pretrain.data.build import build_store, heldout_bytes, prepare_data, train_tokenizer
from headway.pretrain.data.cache import build_once, fingerprint
from headway.pretrain.data.store import TokenStore, is_store
from headway.pretrain.data.text import cut_into_blocks, find_files
from headway.pretrain.data.tokenizer import BytesTokenizer, SentencePieceTokenizer
from headway.pretrain.data.workers import is_heldout
from headway.pretrain.errors import DataError, JobError

BYTES = Tokenizer(kind="bytes")
LINES = [f"def function_{i}(x):\n    return x + {i * i % 97}\n" * (1 + i % 7) for i in range(400)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus" / "a.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in LINES))
    return path


@pytest.fixture
def make(tmp_path: Path, corpus: Path) -> Callable[..., Data]:
    def make(**changes: object) -> Data:
        known = {"sources": [Source(path=str(corpus))], "cache": str(tmp_path / "cache"), "heldout": 0.2}
        return Data(**known | {"tokenizer": BYTES} | changes)

    return make


def test_split_and_content(make: Callable[..., Data]) -> None:
    prepared = prepare_data(make(), progress=False)
    train, heldout = TokenStore(prepared.train[0][0]), TokenStore(prepared.heldout[0])
    sides = [[], []]
    for line, text in enumerate(LINES, 1):
        sides[is_heldout(f"a.jsonl:{line}", 0.2)].append(text)
    for store, texts in ((train, sides[0]), (heldout, sides[1])):
        assert [bytes(store.document(i)[:-1].tolist()).decode() for i in range(store.documents)] == texts
        assert all(store.document(i)[-1] == BytesTokenizer.separator for i in range(store.documents))
        assert store.facts["utf8_bytes"] == sum(map(len, texts))
        assert store.facts["digest"] == BytesTokenizer.digest
    assert heldout_bytes(prepared.heldout, prepared.tokenizer) == "".join(sides[1]).encode()


def test_split_is_stable_and_nested() -> None:
    """Fixed for ever by these values; 1e4 names at 0.1 give 1,000 +- 30, so 5 sigma is 150."""
    names = ["os.py", "asyncio/events.py", "json/decoder.py", "dbm/ndbm.py"]
    assert [is_heldout(name, 0.05) for name in names] == [False, True, False, True]
    kept = [{i for i in range(10_000) if is_heldout(f"name {i}", share)} for share in (0.0, 0.1, 0.3)]
    assert len(kept[0]) == 0
    assert abs(len(kept[1]) - 1000) < 150
    assert kept[1] < kept[2]


def test_any_number_of_workers_gives_the_same_files(
    make: Callable[..., Data], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "ALONE_BYTES", 0)
    monkeypatch.setattr("headway.pretrain.data.text.BLOCK_BYTES", 4096)
    tokenizer = SentencePieceTokenizer(
        train_tokenizer(make(tokenizer=Tokenizer(vocab=400)), progress=False).read_bytes()
    )
    content = []
    for count in (1, 2, 3):
        folder = tmp_path / f"workers{count}"
        build_store(Source(path=str(corpus)), tokenizer, make(workers=count), folder=folder, progress=False)
        content.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert set(content[0]) == {
        f"{side}.{kind}" for side in ("train", "heldout") for kind in ("bin", "idx", "json")
    }
    assert content[0] == content[1] == content[2]


def test_cache(make: Callable[..., Data], corpus: Path) -> None:
    data = make(tokenizer=Tokenizer(vocab=400))
    first, second = prepare_data(data, progress=False), prepare_data(data, progress=False)
    assert [first.built[0].reused, second.built[0].reused] == [False, True]
    assert first.train == second.train
    assert first.tokenizer_path == second.tokenizer_path
    for changed in (make(heldout=0.1), make(tokenizer=Tokenizer(vocab=390)), make(on_error="skip")):
        assert prepare_data(changed, progress=False).train != first.train
    os.utime(corpus, ns=(1, 1))
    assert not prepare_data(data, progress=False).built[0].reused


def test_tokenizer_sees_no_heldout_document(make: Callable[..., Data], corpus: Path, tmp_path: Path) -> None:
    """Held-out documents may change at will: the tokenizer does not."""
    data = make(tokenizer=Tokenizer(vocab=400))
    model = train_tokenizer(data, tmp_path / "a.model", progress=False).read_bytes()
    texts = [("東" * 50 if is_heldout(f"a.jsonl:{i}", 0.2) else text) for i, text in enumerate(LINES, 1)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert train_tokenizer(data, tmp_path / "b.model", progress=False).read_bytes() == model


def test_tokenizer_is_shown_a_bounded_share(make: Callable[..., Data], tmp_path: Path, corpus: Path) -> None:
    """A small source is seen whole, and leaves the rest of its share to the large one."""
    (tmp_path / "small.txt").write_text("s" * 100)
    sources = [Source(path=str(corpus)), Source(path=str(tmp_path / "small.txt"))]
    data = make(sources=sources, heldout=0.0, tokenizer=Tokenizer(train_bytes=5000))
    texts = list(build._training_texts(sources, [find_files(source) for source in sources], data))
    assert sum(len(text.encode()) for text in texts) == 5000
    assert "s" * 100 in texts


def test_malformed_lines_stop_or_are_counted(make: Callable[..., Data], corpus: Path) -> None:
    lines = corpus.read_text().splitlines()
    lines[6] = lines[6][:-3]
    lines[30] = "{}"
    corpus.write_text("\n".join(lines))
    for tokenizer in (BYTES, Tokenizer(vocab=400)):
        with pytest.raises(DataError, match=r"a\.jsonl:7: not JSON.*on_error=skip"):
            prepare_data(make(tokenizer=tokenizer), progress=False)
        prepared = prepare_data(make(tokenizer=tokenizer, on_error="skip"), progress=False)
        assert prepared.built[0].skipped == 2
        assert [place.split(": ")[0] for place in prepared.built[0].skipped_first] == [
            f"{corpus}:7",
            f"{corpus}:31",
        ]
        assert TokenStore(prepared.train[0][0]).facts["skipped"] == 2


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n'])
def test_empty_corpus(make: Callable[..., Data], corpus: Path, content: str) -> None:
    corpus.write_text(content)
    with pytest.raises(DataError, match=r"a\.jsonl: no document to train on"):
        prepare_data(make(), progress=False)
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        prepare_data(make(tokenizer=Tokenizer(vocab=400)), progress=False)


def test_everything_held_out(make: Callable[..., Data], corpus: Path) -> None:
    corpus.write_text('{"text": "one"}\n')
    with pytest.raises(DataError, match=r"all 1 are held out; lower data\.heldout = 0\.9999"):
        prepare_data(make(heldout=0.9999), progress=False)
    prepared = prepare_data(make(heldout=0.0), progress=False)
    assert prepared.heldout == []


def test_stores_pass_through(make: Callable[..., Data], tmp_path: Path, corpus: Path) -> None:
    built = build_store(
        Source(path=str(corpus)), BytesTokenizer(), make(), folder=tmp_path / "own", progress=False
    )
    sources = [Source(path=str(built.train), weight=3.0), Source(path=str(corpus))]
    prepared = prepare_data(make(sources=sources), progress=False)
    assert prepared.train[0] == (built.train, 3.0)
    assert len(prepared.heldout) == 1
    with pytest.raises(DataError, match="written with a tokenizer of 260 ids"):
        prepare_data(make(sources=sources, tokenizer=Tokenizer(vocab=400)), progress=False)
    with pytest.raises(JobError, match="need the tokenizer that wrote them"):
        prepare_data(make(sources=sources[:1], tokenizer=Tokenizer(vocab=400)), progress=False)
    with pytest.raises(JobError, match=r"without \.bin or \.idx"):
        prepare_data(make(sources=[Source(path=f"{built.train}.bin")]), progress=False)


def test_named_folder_is_never_overwritten(make: Callable[..., Data], tmp_path: Path, corpus: Path) -> None:
    source, folder = Source(path=str(corpus)), tmp_path / "own"
    for reused in (False, True):
        assert build_store(source, BytesTokenizer(), make(), folder=folder, progress=False).reused == reused
    with pytest.raises(DataError, match="own: exists and was not built from this"):
        build_store(source, BytesTokenizer(), make(heldout=0.5), folder=folder, progress=False)


PAIRS = [{"text": f"number {i}", "target": f"Zahl {i * i}"} for i in range(300)]


@pytest.fixture
def pairs(corpus: Path) -> Source:
    """A source of pairs; its file holds `PAIRS`."""
    corpus.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return Source(path=str(corpus), target="target")


def texts_of(prefix: Path) -> list[str]:
    store = TokenStore(prefix)
    return [bytes(store.document(i)[:-1].tolist()).decode() for i in range(store.documents)]


def test_pairs_are_aligned(make: Callable[..., Data], pairs: Source) -> None:
    """Both texts of a line are on the side that the line's name says, in order; a plain source has no targets."""
    other = Source(path=pairs.path, weight=2.0)
    prepared = prepare_data(make(sources=[pairs, other]), progress=False)
    assert prepared.train_targets == [prepared.built[0].train_target, None]
    assert prepared.heldout_targets == [prepared.built[0].heldout_target, None]
    kept = [is_heldout(f"a.jsonl:{line}", 0.2) for line in range(1, 301)]
    for heldout, prefix, target in (
        (False, prepared.train[0][0], prepared.train_targets[0]),
        (True, prepared.heldout[0], prepared.heldout_targets[0]),
    ):
        assert target is not None
        expected = [pair for pair, out in zip(PAIRS, kept, strict=True) if out == heldout]
        assert texts_of(prefix) == [pair["text"] for pair in expected]
        assert texts_of(target) == [pair["target"] for pair in expected]
        assert TokenStore(target).facts["utf8_bytes"] == sum(len(pair["target"]) for pair in expected)
    reused = prepare_data(make(sources=[pairs]), progress=False)
    assert (reused.built[0].reused, reused.train_targets) == (True, prepared.train_targets[:1])
    none = prepare_data(make(sources=[pairs], heldout=0.0), progress=False)
    assert none.heldout == none.heldout_targets == []
    assert not is_store(none.train[0][0].with_name("heldout.target"))


def test_any_number_of_workers_gives_the_same_pairs(
    make: Callable[..., Data], pairs: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "ALONE_BYTES", 0)
    monkeypatch.setattr("headway.pretrain.data.text.BLOCK_BYTES", 4096)
    content = []
    for count in (1, 2):
        folder = tmp_path / f"workers{count}"
        build_store(pairs, BytesTokenizer(), make(workers=count), folder=folder, progress=False)
        content.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert len(content[0]) == 12
    assert content[0] == content[1]


MALFORMED = {
    '{"text": "a"}': "no field 'target'; the object has 'text'",
    '{"target": "b"}': "no field 'text'; the object has 'target'",
    '{"text": "a", "target": ""}': "field 'target': the text is empty",
    '{"text": "", "target": "b"}': "field 'text': the text is empty",
    '{"text": "a", "target": null}': "field 'target': the text is not a string but NoneType",
    '{"text": "a", "target": "\\ud83d"}': "field 'target': the text holds half of a surrogate pair",
}


@pytest.mark.parametrize("line", MALFORMED)
def test_malformed_pairs_stop_or_are_counted(
    make: Callable[..., Data], pairs: Source, corpus: Path, line: str
) -> None:
    corpus.write_text(f"{corpus.read_text()}\n{line}\n")
    with pytest.raises(DataError) as caught:
        prepare_data(make(sources=[pairs]), progress=False)
    assert f"a.jsonl:302: {MALFORMED[line]}" in str(caught.value)
    prepared = prepare_data(make(sources=[pairs], on_error="skip"), progress=False)
    assert prepared.built[0].skipped == 1
    assert prepared.built[0].skipped_first[0].startswith(f"{corpus}:302: {MALFORMED[line]}")
    assert TokenStore(prepared.train[0][0]).documents + TokenStore(prepared.heldout[0]).documents == 300


def test_malformed_pairs_of_a_table(make: Callable[..., Data], tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    rows = [*PAIRS[:300], {"text": "a", "target": None}]
    pq.write_table(
        pa.Table.from_pylist([{"target": row["target"], "text": row["text"]} for row in rows]), path
    )
    source = Source(path=str(path), target="target")
    with pytest.raises(DataError, match=r"a\.parquet:301: field 'target': the text is not a string"):
        prepare_data(make(sources=[source], heldout=0.0), progress=False)
    prepared = prepare_data(make(sources=[source], heldout=0.0, on_error="skip"), progress=False)
    assert texts_of(prepared.train[0][0]) == [pair["text"] for pair in PAIRS]
    assert prepared.train_targets[0] is not None
    assert texts_of(prepared.train_targets[0]) == [pair["target"] for pair in PAIRS]
    with pytest.raises(DataError, match=r"no column 'to'; it has target, text \(data\.sources"):
        prepare_data(make(sources=[Source(path=str(path), target="to")]), progress=False)


def test_plain_text_holds_no_pairs(make: Callable[..., Data], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"a\.txt: plain text has no field 'to': pairs are read from \.jsonl"):
        prepare_data(make(sources=[Source(path=str(tmp_path / "a.txt"), target="to")]), progress=False)


def test_stores_of_pairs_pass_through(make: Callable[..., Data], pairs: Source, tmp_path: Path) -> None:
    built = build_store(pairs, BytesTokenizer(), make(), folder=tmp_path / "own", progress=False)
    source = Source(path=str(built.train), target="target")
    assert prepare_data(make(sources=[source]), progress=False).train_targets == [built.train_target]
    assert prepare_data(make(sources=[Source(path=source.path)]), progress=False).train_targets == [None]
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / "own" / f"train.target{suffix}").unlink()
    with pytest.raises(JobError, match=r"data\.sources\[\]\.target.*no .*own/train\.target\.idx"):
        prepare_data(make(sources=[source]), progress=False)


def test_tokenizer_sees_targets(make: Callable[..., Data], pairs: Source) -> None:
    texts = list(build._training_texts([pairs], [find_files(pairs)], make(heldout=0.0)))
    assert texts == [text for pair in PAIRS for text in pair.values()]
    limited = make(heldout=0.0, tokenizer=Tokenizer(train_bytes=100))
    assert sum(map(len, build._training_texts([pairs], [find_files(pairs)], limited))) == 100


def test_targets_do_not_move_what_is_cached(make: Callable[..., Data], pairs: Source, corpus: Path) -> None:
    """The fingerprint of a source without targets is that of the release before there were any."""
    status = corpus.stat()
    files = [(str(corpus), "a.jsonl", status.st_size, status.st_mtime_ns)]
    mark = fingerprint(
        format=1, files=files, column="text", heldout=0.2, on_error="stop", digest=BytesTokenizer.digest
    )
    plain = prepare_data(make(), progress=False).train[0][0]
    assert plain.parent.name == mark
    assert prepare_data(make(sources=[pairs]), progress=False).train[0][0] != plain


def test_lossy_tokenizer_has_no_bits_per_byte(make: Callable[..., Data]) -> None:
    class Lossy(BytesTokenizer):
        def decode(self, ids):  # type: ignore[no-untyped-def]
            return super().decode(ids).strip()

    prepared = prepare_data(make(), progress=False)
    with pytest.raises(DataError, match="lossy"):
        heldout_bytes(prepared.heldout, Lossy())


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(place: Path) -> None:
        (place / "train.bin").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"mark: cannot be written.*No space left"):
        build_once(tmp_path / "mark", fail)
    assert [path.name for path in tmp_path.iterdir()] == [".mark.lock"]


KILLED = """
import os, signal, sys
from pathlib import Path
from headway.pretrain.data.cache import build_once
def build(place):
    (place / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
build_once(Path(sys.argv[1]), build)
"""


def test_killed_build_looks_unfinished_and_is_built_again(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "mark")], env=environment)
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "mark").exists()
    assert build_once(tmp_path / "mark", lambda place: (place / "whole").touch())
    assert [path.name for path in (tmp_path / "mark").iterdir()] == ["whole"]


RACE = """
import sys
from pathlib import Path
from headway.pretrain.data.cache import build_once
print(build_once(Path(sys.argv[1]), lambda place: (place / "whole").touch()))
"""


def test_of_many_processes_one_builds(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", RACE, str(tmp_path / "mark")]
    racers = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(5)]
    assert sorted(racer.communicate()[0].strip() for racer in racers) == ["False"] * 4 + ["True"]


def test_killed_worker_is_an_error(
    make: Callable[..., Data], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "ALONE_BYTES", 0)
    start = workers.Worker.__init__

    def die(self: workers.Worker, work: workers.Work) -> None:
        start(self, work)
        self._process.kill()

    monkeypatch.setattr(workers.Worker, "__init__", die)
    monkeypatch.setattr("headway.pretrain.data.text.BLOCK_BYTES", 4096)
    with pytest.raises(DataError, match=r"ended with status -9.*data\.workers"):
        prepare_data(make(workers=2), progress=False)
    assert not [path for path in (tmp_path / "cache" / "stores").iterdir() if not path.name.startswith(".")]


def test_malformed_line_in_a_worker(corpus: Path) -> None:
    """A worker hands its error over and works on."""
    good = corpus.read_text()
    corpus.write_text("print\n" + good)
    files = find_files(Source(path=str(corpus)))
    (block,) = cut_into_blocks(files, "text")
    work = workers.Work(BytesTokenizer(), "text", 0.0, skip=False)
    worker = workers.Worker(work)
    try:
        with pytest.raises(DataError, match=r"a\.jsonl:1: not JSON"):
            worker.encode(block)
        corpus.write_text(good)
        (block,) = cut_into_blocks(files, "text")
        encoded, expected = worker.encode(block), workers.encode_block(block, work)
        assert encoded.sides["train"].stream == expected.sides["train"].stream
        assert encoded.sides["train"].lengths.tolist() == [len(text) + 1 for text in LINES]
    finally:
        worker.stop()
