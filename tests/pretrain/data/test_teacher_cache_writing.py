"""Writing a teacher's cache: what is given twice, what does not fit, several processes, kills at every moment."""

import os
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import safetensors.torch
import torch

from headway.pretrain.data.teacher_cache import CacheWriter, Field, TeacherCache
from headway.pretrain.data.teacher_cache import disk as disk_module
from headway.pretrain.errors import DataError
from headway.tests.pretrain.data.test_teacher_cache import (
    FIELDS,
    IDENTITY,
    KEYS,
    assert_rows,
    ints,
    rows_of,
    write,
)


def test_the_same_row_twice_is_stored_once(tmp_path):
    """In one call, over calls, and over shards; over parts that were open at once it is indexed once."""
    writer = CacheWriter(tmp_path / "c", IDENTITY, FIELDS, shard_rows=2)
    with CacheWriter(tmp_path / "c", IDENTITY, FIELDS, part=1, shard_rows=2) as other:
        other.add(ints(3, 8), rows_of(ints(3, 8)))
    for keys in (ints(1, 1, 2, 1), ints(2, 3), ints(1, 3, 4)):
        writer.add(keys, rows_of(keys))
    cache = TeacherCache.open(writer.publish(parts=2))
    assert len(cache) == 5
    assert_rows(cache.read(ints(8, 3, 1, 2, 4)), ints(8, 3, 1, 2, 4))
    stored = [
        safetensors.torch.load_file(file)["key"].tolist() for file in sorted((tmp_path / "c").glob("*/*"))
    ]
    assert stored == [[1, 2], [3, 4], [3, 8]]


@pytest.mark.parametrize("written", [0, 1, 2], ids=["same call", "in memory", "on disk"])
def test_another_row_of_the_same_key_is_refused(tmp_path, written):
    writer = CacheWriter(tmp_path / "c", IDENTITY, FIELDS, shard_rows=2)
    keys = ints(6, 7)[:written]
    writer.add(keys, rows_of(keys))
    rows = rows_of(ints(6, 6))
    rows["ids"][1, 2, 1] += 1
    with pytest.raises(DataError, match="key 6 was given twice, with different ids"):
        writer.add(ints(6, 6), rows)


def test_parts_that_disagree_about_a_row_are_refused(tmp_path):
    """When they are joined; a part that opens after the other closed knows already when the row is added."""
    rows = rows_of(ints(6))
    writer = CacheWriter(tmp_path / "c", IDENTITY, FIELDS)
    with CacheWriter(tmp_path / "c", IDENTITY, FIELDS, part=1) as other:
        other.add(ints(6), rows)
    rows["norm"] += 1
    with (
        CacheWriter(tmp_path / "c", IDENTITY, FIELDS, part=2) as later,
        pytest.raises(DataError, match="key 6 was given twice, with different norm"),
    ):
        later.add(ints(6), rows)
    writer.add(ints(6), rows)
    with pytest.raises(DataError, match="key 6 was given twice, with different norm"):
        writer.publish(parts=2)
    assert not (tmp_path / "c").exists()


def test_narrower_fields_round_as_torch_does(tmp_path):
    value = torch.randn(4, 3, dtype=torch.float64)
    value[0, 0], value[1, 1] = float("nan"), float("-inf")
    fields = {
        dtype: Field(getattr(torch, dtype), (3,)) for dtype in ("bfloat16", "float16", "float32", "int32")
    }
    whole = torch.arange(12).view(4, 3) * 1000
    with CacheWriter(tmp_path / "c", {}, fields) as writer:
        writer.add(torch.arange(4), {name: whole if name == "int32" else value for name in fields})
    found = TeacherCache.open(writer.publish()).read(torch.arange(4))
    for name, field in fields.items():
        given = whole if name == "int32" else value
        assert torch.equal(found[name].nan_to_num(7), given.to(field.dtype).nan_to_num(7))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("logits", torch.full((1, 4, 3), 3.4e38), "logits: numbers beyond the range of torch.bfloat16"),
        ("query.0", torch.full((1, 2, 4, 5), -65520.0), "query.0: numbers beyond the range of torch.float16"),
        ("ids", torch.full((1, 4, 3), 2**31), "ids: numbers beyond the range of torch.int32"),
        ("ids", torch.zeros(1, 4, 3), "ids: torch.float32 given, its field is torch.int32"),
        (
            "ids",
            torch.zeros(1, 3, 4, dtype=torch.int64),
            r"ids: rows of shape \[3, 4\], its field has \[4, 3\]",
        ),
        ("ids", torch.zeros(2, 4, 3, dtype=torch.int64), "ids: 2 rows for 1 keys"),
        ("more", torch.zeros(1), "rows: given are .*more"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rows_that_do_not_fit_are_refused(tmp_path, name, value, message):
    with CacheWriter(tmp_path / "c", IDENTITY, FIELDS) as writer, pytest.raises(ValueError, match=message):
        writer.add(ints(1), {**rows_of(ints(1)), name: value})
    assert not writer.has(ints(1)).any()


PROCESS = """
import sys, os, signal, torch
from headway.pretrain.data.teacher_cache import CacheWriter, Field

folder, part, first, last, die_at = sys.argv[1], *map(int, sys.argv[2:])
fields = {"x": Field(torch.bfloat16, (2, 3))}
with CacheWriter(folder, {"teacher": "t"}, fields, part=part, shard_rows=4) as writer:
    for key in range(first, last):
        if key == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        writer.add(torch.tensor([key]), {"x": torch.full((1, 2, 3), float(key))})
"""


def start(folder: Path, *numbers: int) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", PROCESS, str(folder), *map(str, numbers)], env=os.environ)


def test_processes_write_parts_and_one_is_killed(tmp_path):
    """Part 0 ends, part 1 is killed with two whole shards and two rows in memory, and one process goes on."""
    folder, fields = tmp_path / "c", {"x": Field(torch.bfloat16, (2, 3))}
    processes = [start(folder, 0, 0, 10, -1), start(folder, 1, 10, 30, 20)]
    assert [process.wait() for process in processes] == [0, -signal.SIGKILL]
    with pytest.raises(DataError, match=r"manifest\.json: cannot be read"):
        TeacherCache.open(folder)
    writer = CacheWriter.resume(folder, {"teacher": "t"}, fields, shard_rows=4)
    with pytest.raises(DataError, match="part_0001: the part is not complete"):
        writer.publish(parts=2)
    keys = torch.arange(30)
    with CacheWriter.resume(folder, {"teacher": "t"}, fields, shard_rows=4) as writer:
        known = writer.has(keys)
        assert keys[known].tolist() == list(range(18))
        rest = keys[~known]
        writer.add(rest, {"x": rest.view(-1, 1, 1).expand(-1, 2, 3).float()})
    cache = TeacherCache.open(writer.publish(parts=1))
    assert len(cache) == 30
    assert torch.equal(cache.read(keys)["x"], keys.view(-1, 1, 1).expand(-1, 2, 3).bfloat16())
    assert cache.verify() == []


class Killed(BaseException):
    """Not an Exception, so that nothing handles it."""


def test_a_kill_at_any_moment(tmp_path, monkeypatch):
    """Stop at the n-th sync, with half of the file written, for all n: nothing looks complete before it is, and what
    goes on gives the same cache and computes no row of a whole shard again."""
    for moment in count():
        folder, left = tmp_path / str(moment) / "c", iter(range(moment))
        folder.parent.mkdir()

        def sync(handle: int, left=left) -> None:
            if next(left, None) is None:
                if os.fstat(handle).st_size and not os.path.isdir(f"/proc/self/fd/{handle}"):
                    os.ftruncate(handle, os.fstat(handle).st_size // 2)
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(disk_module.os, "fsync", sync)
            try:
                write(folder, KEYS)
                break
            except Killed:
                pass
        if not folder.exists():
            with CacheWriter.resume(folder, IDENTITY, FIELDS, shard_rows=3) as writer:
                assert int(writer.has(KEYS).sum()) in (0, 3, 6, 8)
                rest = KEYS[~writer.has(KEYS)]
                writer.add(rest, rows_of(rest))
            writer.publish()
        cache = TeacherCache.open(folder)
        assert len(cache) == len(KEYS)
        assert cache.verify() == []
        assert_rows(cache.read(KEYS), KEYS)
    assert moment > 20  # three shards and their lists, the index, the manifest, and their folders


def test_one_process_a_part_and_nothing_twice(tmp_path):
    with CacheWriter(tmp_path / "c", IDENTITY, FIELDS) as writer:
        with pytest.raises(
            DataError, match=r"an interrupted writing left it: go on with CacheWriter\.resume"
        ):
            CacheWriter(tmp_path / "c", IDENTITY, FIELDS)
        with pytest.raises(DataError, match="another process writes this part"):
            CacheWriter.resume(tmp_path / "c", IDENTITY, FIELDS)
        writer.add(KEYS, rows_of(KEYS))
    with pytest.raises(ValueError, match="this writer is closed"):
        writer.add(KEYS, rows_of(KEYS))
    with pytest.raises(DataError, match=r"part_0001: the part is missing"):
        writer.publish(parts=2)
    writer.publish()
    for begin in (CacheWriter, CacheWriter.resume):
        with pytest.raises(DataError, match="c: exists already; delete it"):
            begin(tmp_path / "c", IDENTITY, FIELDS)


def test_a_part_without_rows_and_a_cache_without_rows(tmp_path):
    with CacheWriter(tmp_path / "c", IDENTITY, FIELDS, part=1):
        pass
    writer = CacheWriter(tmp_path / "c", IDENTITY, FIELDS)
    with pytest.raises(DataError, match="nothing was written"):
        writer.publish(parts=2)
    with CacheWriter.resume(tmp_path / "c", IDENTITY, FIELDS) as writer:
        writer.add(KEYS, rows_of(KEYS))
    assert len(TeacherCache.open(writer.publish(parts=2))) == len(KEYS)
    assert not (tmp_path / "c" / "part_0001").exists()


@pytest.mark.parametrize(
    ("identity", "fields", "options", "message"),
    [
        ({"a": (1,)}, FIELDS, {}, r"identity: 'a' = \(1,\): entries are JSON values"),
        ({"a": float("nan")}, FIELDS, {}, "identity: 'a' = nan"),
        ({"a": {1: 2}}, FIELDS, {}, "identity: 'a'"),
        ({}, {}, {}, "fields: there must be one at least"),
        ({}, {"key": FIELDS["norm"]}, {}, "fields: the name 'key' is taken"),
        ({}, FIELDS, {"part": -1}, "part = -1"),
        ({}, FIELDS, {"shard_rows": 0}, "shard_rows = 0: must be 1 to"),
    ],
)
def test_descriptions_that_cannot_be_kept_are_refused(tmp_path, identity, fields, options, message):
    with pytest.raises(ValueError, match=message):
        CacheWriter(tmp_path / "c", identity, fields, **options)


@pytest.mark.parametrize(
    ("dtype", "shape", "message"),
    [(torch.int16, (2,), "one of int64.*not torch.int16"), (torch.int32, (2, 0), r"not \(2, 0\)")],
)
def test_fields_that_cannot_be_kept_are_refused(dtype, shape, message):
    with pytest.raises(ValueError, match=message):
        Field(dtype, shape)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    writer = CacheWriter(tmp_path / "c", IDENTITY, FIELDS)
    writer.add(KEYS, rows_of(KEYS))
    with monkeypatch.context() as patch:
        patch.setattr(disk_module.os, "fsync", full)
        with pytest.raises(
            DataError, match=r"part_0000: cannot be written: .*No space left on device; free space"
        ):
            writer.close()
    assert not CacheWriter.resume(tmp_path / "c", IDENTITY, FIELDS).has(KEYS).any()
