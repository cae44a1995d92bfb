"""A teacher's cache of another run, and damage to its files: each is named."""

import json
from pathlib import Path

import pytest
import torch

from headway.pretrain.data.teacher_cache import CacheWriter, Field, TeacherCache
from headway.pretrain.errors import DataError, JobError
from headway.tests.pretrain.data.test_teacher_cache import (
    FIELDS,
    IDENTITY,
    KEYS,
    manifest_with,
    rows_of,
    write,
)


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"distill.teacher": "z9"}, "distill.teacher", r"made by another teacher \('a1'\)"),
        ({"tokenizer": "z9"}, "tokenizer", r"made with another tokenizer \('b2'\)"),
        ({"data": "z9", "temperature": 3.0}, "data", r"made from other data \('c3'\)"),
        ({"temperature": 3.0}, "temperature", r"made with another temperature \(2\.0\)"),
        ({"layers": [0, 2]}, "layers", r"made of other layers \(\[0, 3\]\)"),
        ({"top_k": 8}, "top_k", r"with another top_k \(it does not say which\)"),
    ],
)
def test_what_another_run_made_is_named(tmp_path, change, field, message):
    cache, other = write(tmp_path / "c", KEYS), IDENTITY | change
    cache.check(IDENTITY)
    with pytest.raises(JobError, match=message) as caught:
        cache.check(other)
    assert (caught.value.field, caught.value.value, caught.value.nearest) == (
        field,
        other[field],
        IDENTITY.get(field),
    )
    with CacheWriter(tmp_path / "d", IDENTITY, FIELDS) as writer:
        writer.add(KEYS, rows_of(KEYS))
    with pytest.raises(JobError, match=message):
        CacheWriter.resume(tmp_path / "d", other, FIELDS)


def test_entries_that_a_run_does_not_state_differ(tmp_path):
    with pytest.raises(JobError, match=r"data = None: the cache .* was made from other data"):
        write(tmp_path / "c", KEYS).check({name: value for name, value in IDENTITY.items() if name != "data"})


def test_parts_of_other_fields_are_named(tmp_path):
    with CacheWriter(tmp_path / "c", IDENTITY, FIELDS, part=1):
        pass
    other = FIELDS | {"ids": Field(torch.int64, (4, 3))}
    with pytest.raises(JobError, match=r"fields\.ids = 'int64\[4, 3\]': .* \('int32\[4, 3\]'\)"):
        CacheWriter(tmp_path / "c", IDENTITY, other)


def damage(folder: Path, name: str) -> None:
    manifest, index, shard = (
        folder / "manifest.json",
        folder / "index.bin",
        folder / "part_0000/shard_00001.safetensors",
    )
    match name:
        case "no manifest":
            manifest.unlink()
        case "edited manifest":
            manifest.write_text(manifest.read_text().replace('"temperature": 2.0', '"temperature": 3.0'))
        case "stump of a manifest":
            manifest.write_bytes(manifest.read_bytes()[:-20])
        case "other JSON":
            manifest.write_text('{"format": "x"}')
        case "later version":
            manifest_with(folder, version=2)
        case "path":
            first = json.loads(manifest.read_text())["shards"][0]
            manifest_with(folder, shards=[first | {"file": "../../secret"}])
        case "no shard":
            shard.unlink()
        case "truncated shard":
            shard.write_bytes(shard.read_bytes()[:-1])
        case "truncated index":
            index.write_bytes(index.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no manifest", r"manifest\.json: cannot be read: No such file"),
        ("edited manifest", r"manifest\.json: damaged: its content does not have the digest"),
        ("stump of a manifest", r"manifest\.json: not the JSON of a teacher's cache"),
        ("other JSON", r"manifest\.json: not the JSON of a teacher's cache of version 1"),
        ("later version", r"manifest\.json: not the JSON of a teacher's cache of version 1"),
        ("path", r"manifest\.json: lists '\.\./\.\./secret'"),
        ("no shard", r"shard_00001\.safetensors: cannot be read: No such file"),
        ("truncated shard", r"shard_00001\.safetensors: truncated or damaged: \d+ bytes, \d+ were written"),
        ("truncated index", r"index\.bin: truncated or damaged: 120 bytes, 128 were written"),
    ],
)
def test_opening_names_damage(tmp_path, name, message):
    write(tmp_path / "c", KEYS)
    damage(tmp_path / "c", name)
    with pytest.raises(DataError, match=message):
        TeacherCache.open(tmp_path / "c")


def test_verify_names_flipped_bytes_and_what_vanished(tmp_path):
    cache = write(tmp_path / "c", KEYS)
    shards = sorted((tmp_path / "c/part_0000").iterdir())
    for file in (shards[1], tmp_path / "c/index.bin"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    shards[2].unlink()
    problems = cache.verify()
    assert [problem.partition(": ")[0] for problem in problems] == [
        str(tmp_path / "c/index.bin"),
        str(shards[1]),
        str(shards[2]),
    ]
    assert "damaged: sha256 is" in problems[1]
    assert "cannot be read" in problems[2]


def test_a_shard_of_other_fields_is_not_read(tmp_path):
    cache = write(tmp_path / "c", KEYS)
    shard = tmp_path / "c/part_0000/shard_00000.safetensors"
    shard.write_bytes(shard.read_bytes().replace(b'"I32"', b'"U32"'))
    with pytest.raises(DataError, match=r"shard_00000\.safetensors: damaged: its header"):
        cache.read(KEYS)
