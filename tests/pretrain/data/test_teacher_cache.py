"""A teacher's cache against safetensors, torch's indexing and dicts."""

import json
import pickle
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.pretrain.data.teacher_cache import CacheWriter, Field, TeacherCache
from headway.pretrain.data.teacher_cache import shards as shards_module
from headway.pretrain.data.teacher_cache.contents import _digest
from headway.pretrain.errors import DataError

IDENTITY = {"distill.teacher": "a1", "tokenizer": "b2", "data": "c3", "temperature": 2.0, "layers": [0, 3]}
FIELDS = {
    "logits": Field(torch.bfloat16, (4, 3)),
    "ids": Field(torch.int32, (4, 3)),
    "query.0": Field(torch.float16, (2, 4, 5)),
    "norm": Field(torch.float32, ()),
    "exact": Field(torch.float64, (2,)),
    "count": Field(torch.int64, (1,)),
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32, torch.int64]


def rows_of(keys: torch.Tensor, fields: dict[str, Field] = FIELDS) -> dict[str, torch.Tensor]:
    """What a teacher would give: a function of the key and of the name."""
    out = {}
    for name, field in fields.items():
        each = []
        for key in keys.tolist():
            generator = torch.Generator().manual_seed(hash((key, len(name))) % 2**31)
            each.append(torch.randint(-(2**31), 2**31 - 1, field.shape, generator=generator))
        value = torch.stack(each) if each else torch.zeros((0, *field.shape), dtype=torch.int64)
        out[name] = (
            (value / 2**28).to(field.dtype) if field.dtype.is_floating_point else value.to(field.dtype)
        )
    return out


def ints(*keys: int) -> torch.Tensor:
    return torch.tensor(keys, dtype=torch.int64)


def write(folder: Path, keys: torch.Tensor, shard_rows: int = 3) -> TeacherCache:
    with CacheWriter(folder, IDENTITY, FIELDS, shard_rows=shard_rows) as writer:
        for some in keys.split(2):
            writer.add(some, rows_of(some))
    return TeacherCache.open(writer.publish())


def assert_rows(found: dict[str, torch.Tensor], keys: torch.Tensor) -> None:
    expected = rows_of(keys)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def manifest_with(folder: Path, **change: object) -> None:
    """Rewrite the manifest, digest and all, as somebody would who knew the format."""
    body = json.loads((folder / "manifest.json").read_text()) | change
    del body["digest"]
    (folder / "manifest.json").write_text(json.dumps(body | {"digest": _digest(body)}))


KEYS = ints(5, -7, 2**63 - 1, 0, -(2**63), 11, 12, 13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_pattern_comes_back(tmp_path, dtype):
    """All 2^16 patterns of 16-bit dtypes, random ones of wider dtypes, NaNs among them."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    if dtype.itemsize == 2:
        bits = torch.arange(-(2**15), 2**15).to(width).view(16, 64, 64)
    else:
        info = torch.iinfo(width)
        bits = torch.randint(info.min, info.max, (16, 64, 64), dtype=width)
    with CacheWriter(tmp_path / "c", {}, {"x": Field(dtype, (64, 64))}, shard_rows=5) as writer:
        writer.add(torch.arange(16), {"x": bits.view(dtype)})
    found = TeacherCache.open(writer.publish()).read(torch.arange(16))["x"]
    assert found.dtype == dtype
    assert torch.equal(found.view(width), bits)


def test_shards_are_safetensors_byte_for_byte(tmp_path):
    cache = write(tmp_path / "c", KEYS)
    files = sorted((tmp_path / "c").glob("*/*"))
    assert [str(file.relative_to(tmp_path / "c")) for file in files] == [
        f"part_0000/shard_{i:05d}.safetensors" for i in range(3)
    ]
    for file, keys in zip(files, KEYS.split(3), strict=True):
        with safetensors.safe_open(file, "pt") as theirs:
            found = {name: theirs.get_tensor(name) for name in theirs.keys()}  # noqa: SIM118
        assert torch.equal(found["key"], keys)
        assert_rows({name: found[name] for name in FIELDS}, keys)
        assert file.read_bytes() == safetensors.torch.save({**rows_of(keys), "key": keys})
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "index.bin",
        "manifest.json",
        "part_0000",
    ]
    assert cache.verify() == []


def test_rows_in_the_order_asked_for(tmp_path):
    cache = pickle.loads(pickle.dumps(write(tmp_path / "c", KEYS)))
    assert len(cache) == len(KEYS)
    for order in (KEYS, KEYS.flip(0), KEYS[[3, 3, 0, 7, 3]], KEYS[:0]):
        assert_rows(cache.read(order), order)
        assert_rows(cache.read(order.numpy()), order)
    assert cache.read(KEYS, names=["ids"]).keys() == {"ids"}


@pytest.mark.parametrize(
    ("dim", "which"),
    [
        (0, slice(1, None)),
        (1, slice(None, None, -2)),
        (2, slice(1, 3)),
        (1, ints(3, 0, 0)),
        (2, ints(4)),
        (0, ints()),
    ],
    ids=str,
)
def test_parts_of_rows(tmp_path, dim, which):
    """As indexing of the whole, in numpy because torch has no negative steps."""
    cache, keys = write(tmp_path / "c", KEYS), KEYS[[4, 1, 7]]
    found = cache.read(keys, slices={"query.0": (dim, which)})
    index = (*[slice(None)] * (dim + 1), which if isinstance(which, slice) else which.numpy())
    assert np.array_equal(found["query.0"].numpy(), rows_of(keys)["query.0"].numpy()[index])
    assert torch.equal(found["ids"], rows_of(keys)["ids"])


def test_missing_keys_are_counted(tmp_path):
    cache = write(tmp_path / "c", KEYS)
    with pytest.raises(
        DataError, match=r"2 of 3 samples have no row, the first has the key 99: .*data, seed and steps"
    ):
        cache.read(ints(5, 99, -99))


@settings(deadline=None, max_examples=25)
@given(
    keys=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-5, 5), min_size=1, max_size=25),
    shard_rows=st.integers(1, 9),
    parts=st.integers(1, 3),
    data=st.data(),
)
def test_against_a_dict(tmp_path_factory, keys, shard_rows, parts, data):
    folder, fields = tmp_path_factory.mktemp("c") / "c", {"x": FIELDS["logits"], "y": FIELDS["norm"]}
    model = {}
    with ExitStack() as stack:
        for part in range(parts):
            writer = CacheWriter(folder, IDENTITY, fields, part=part, shard_rows=shard_rows)
            stack.enter_context(writer)  # all are open at once, as on ranks
            own = ints(*keys[part::parts])
            for some in own.split(data.draw(st.integers(1, 5))):
                rows = rows_of(some, fields)
                model |= {key: {n: v[i] for n, v in rows.items()} for i, key in enumerate(some.tolist())}
                writer.add(some, rows)
            assert writer.has(own).all()
    cache = TeacherCache.open(writer.publish(parts))
    assert len(cache) == len(model)
    asked = data.draw(st.lists(st.sampled_from(sorted(model)), max_size=30))
    for name, value in cache.read(ints(*asked)).items():
        assert value.shape == (len(asked), *fields[name].shape)
        assert all(torch.equal(row, model[key][name]) for row, key in zip(value, asked, strict=True))
    strangers = [key for key in range(-9, 9) if key not in model]
    with pytest.raises(DataError, match=f"{len(strangers)} of {len(strangers)} samples"):
        cache.read(ints(*strangers))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["logit"]}, "'logit' is no field of .*: it has logits, ids"),
        ({"slices": {"logit": (0, slice(1))}}, "'logit' is no field"),
        ({"slices": {"ids": (2, slice(1))}}, r"ids = int32\[4, 3\] has no dim 2"),
        (
            {"slices": {"ids": (1, ints(0, 3))}},
            r"indices are int64 \[m\] of 0 to 2, not torch.int64 \[0, 3\]",
        ),
        ({"slices": {"ids": (1, ints(-1))}}, r"indices are int64 \[m\] of 0 to 2"),
        ({"slices": {"ids": (1, torch.ones(3, dtype=torch.bool))}}, "not torch.bool"),
        ({"keys": torch.ones(3)}, r"keys are int64 \[n\], not float32 \[3\]"),
        ({"keys": KEYS[None]}, r"keys are int64 \[n\], not int64 \[1, 8\]"),
    ],
)
def test_questions_that_have_no_answer_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "c", KEYS).read(**{"keys": KEYS} | arguments)


def test_few_shards_are_open_at_once(tmp_path, monkeypatch):
    """A map holds a file descriptor."""
    monkeypatch.setattr(shards_module, "MAPPED", 3)
    keys = torch.arange(20)
    with CacheWriter(tmp_path / "c", {}, {"x": Field(torch.int32, ())}, shard_rows=1) as writer:
        writer.add(keys, {"x": keys})
    cache = TeacherCache.open(writer.publish())
    del writer
    assert torch.equal(cache.read(keys.flip(0))["x"], keys.flip(0).int())
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert sum(str(tmp_path) in line and "shard_" in line for line in maps) == 3


def test_opening_a_billion_rows(tmp_path):
    """Index and shard are sparse files of 28 GB: only the pages that are touched exist."""
    rows, key = 10**9, 2**40
    with CacheWriter(tmp_path / "c", {}, {"x": Field(torch.int32, ())}) as writer:
        writer.add(ints(1), {"x": ints(1)})
    folder = writer.publish()
    head = shards_module.header({"x": Field(torch.int32, ())}, rows)
    shard = folder / "part_0000/shard_00000.safetensors"
    with shard.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + 12 * rows)
        file.seek(len(head) + 12 * rows - 4)
        file.write((77).to_bytes(4, "little"))
    with (folder / "index.bin").open("wb") as file:
        file.truncate(16 * rows)
        for at, value in ((8 * rows - 8, key), (16 * rows - 8, rows - 1)):
            file.seek(at)
            file.write(value.to_bytes(8, "little"))
    listed = {
        "file": "part_0000/shard_00000.safetensors",
        "rows": rows,
        "bytes": len(head) + 12 * rows,
        "sha256": "0" * 64,
    }
    manifest_with(folder, rows=rows, shards=[listed])
    cache = TeacherCache.open(folder)
    assert isinstance(cache._index.keys, np.memmap)
    assert isinstance(cache._index.places, np.memmap)
    assert len(cache) == rows
    assert cache.read(ints(key, key))["x"].tolist() == [77, 77]
    with pytest.raises(DataError, match="no row"):
        cache.read(ints(key + 1))
