"""The JSON of a cache: what it was made from, what it holds, and in which files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headway.pretrain.data.teacher_cache.fields import KEY, NAMES, Field, Fields
from headway.pretrain.errors import DataError, JobError

VERSION = {"format": "headway-teacher-cache", "version": 1}
MANIFEST, PART = "manifest.json", "part.json"

_FILE = re.compile(r"part_\d{4,}/shard_\d{5,}\.safetensors")

# How a person says that an entry of the identity differs.
_ANOTHER = {
    "teacher": "by another teacher",
    "tokenizer": "with another tokenizer",
    "data": "from other data",
    "sources": "from other data",
    "layers": "of other layers",
}


@dataclass(frozen=True)
class Shard:
    """A shard file, named from the cache's folder: its rows, size in bytes and digest."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Contents:
    """What `manifest.json` says of a cache, and `part.json` of what one process wrote.

    Attributes:
        identity: JSON values on which the content depends.
        fields: what a row holds.
        shards: whole shard files; their order numbers them.
        rows: keys in the index; a part has none yet.
        index: sha256 of the index; a part has none yet.
        complete: the process that wrote the part came to its end. True of every manifest.
    """

    identity: dict[str, Any]
    fields: Fields
    shards: tuple[Shard, ...] = ()
    rows: int = 0
    index: str = ""
    complete: bool = False

    def dump(self) -> bytes:
        """The bytes of its file, with a digest of its own."""
        fields = {
            name: {"dtype": str(field.dtype).removeprefix("torch."), "shape": list(field.shape)}
            for name, field in self.fields.items()
        }
        body = VERSION | vars(self) | {"fields": fields, "shards": [asdict(shard) for shard in self.shards]}
        return json.dumps(body | {"digest": _digest(body)}, indent=1, allow_nan=False).encode() + b"\n"

    def check(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Raise JobError naming the first entry in which this identity and that of the cache differ."""
        _check_equal(folder, self.identity, identity)

    def check_fields(self, folder: Path, fields: Fields) -> None:
        """Raise JobError naming the first field that the cache has otherwise."""
        there, here = ({f"fields.{n}": str(f) for n, f in each.items()} for each in (self.fields, fields))
        _check_equal(folder, there, here)


def check_description(identity: Mapping[str, Any], fields: Fields) -> None:
    """Raise ValueError unless the identity comes back from JSON as it went in and names of fields are legal."""
    for entry, value in identity.items():
        try:
            kept = json.loads(json.dumps({entry: value}, allow_nan=False)) == {entry: value}
        except (TypeError, ValueError):
            kept = False
        if not kept:
            raise ValueError(f"identity: {entry!r} = {value!r}: entries are JSON values (no tuple, no NaN)")
    if not fields:
        raise ValueError("fields: there must be one at least")
    for name in fields:
        if name in ("", KEY, "__metadata__"):
            raise ValueError(f"fields: the name {name!r} is taken; choose another")


def read_contents(path: Path) -> Contents:
    """Read `manifest.json` or `part.json`; raises DataError naming what is wrong with it."""
    try:
        body = json.loads(path.read_bytes())
        if {name: body.get(name) for name in VERSION} != VERSION:
            raise DataError(f"{path}: not the JSON of a teacher's cache of version {VERSION['version']}")
        if body.pop("digest", None) != _digest(body):
            raise DataError(f"{path}: damaged: its content does not have the digest that it states")
        fields = {name: Field(NAMES[f["dtype"]], tuple(f["shape"])) for name, f in body["fields"].items()}
        shards = tuple(Shard(**shard) for shard in body["shards"])
        rest = {name: body[name] for name in ("identity", "rows", "index", "complete")}
        contents = Contents(fields=fields, shards=shards, **rest)
    except OSError as fault:
        raise DataError(
            f"{path}: cannot be read: {fault.strerror}; name the folder of a whole cache"
        ) from fault
    except (ValueError, TypeError, KeyError, AttributeError) as fault:
        raise DataError(f"{path}: not the JSON of a teacher's cache: {fault!r}") from fault
    for shard in shards:
        # The name becomes a path: nothing but a shard's own name may pass.
        if not _FILE.fullmatch(shard.file):
            raise DataError(
                f"{path}: lists {shard.file!r}, and shards are called part_NNNN/shard_NNNNN.safetensors"
            )
    return contents


def _check_equal(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    for entry in [*here, *(entry for entry in there if entry not in here)]:
        if entry in there and entry in here and there[entry] == here[entry]:
            continue
        subject = entry.rpartition(".")[2].removesuffix("_digest").removesuffix("_fingerprint")
        another = _ANOTHER.get(subject, f"with another {entry}")
        found = repr(there[entry]) if entry in there else "it does not say which"
        rule = f"the cache {folder} was made {another} ({found}): use what it was made with, or make another cache"
        raise JobError(entry, here.get(entry), rule, there.get(entry))


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
