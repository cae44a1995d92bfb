"""The manifest: what a checkpoint holds and where, as JSON that is checked before anything trusts it."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headway.parallel.checkpoint.boxes import Box, flaw
from headway.pretrain.errors import CheckpointError
from headway.pretrain.tensor_files import DTYPES

MANIFEST = "manifest.json"
FORMAT = "headway-checkpoint"
VERSION = 1
LARGEST = 256 << 20
"""Bytes of a manifest that are read at most (some three million pieces): a bound on hostile input."""

_FILE = re.compile(r"shard_\d{5}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Piece:
    """A part of a tensor and the shard file that holds it."""

    box: Box
    file: str


@dataclass(frozen=True)
class Entry:
    """A tensor: its global shape, torch's name of its dtype, and the pieces that cover it exactly."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return Box.whole(self.shape).numel * DTYPES[self.dtype][1]


@dataclass(frozen=True)
class File:
    """Size and digest of a shard file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All that a checkpoint says about itself.

    Attributes:
        step: optimizer steps taken.
        created: UTC time of writing, ISO 8601.
        world: ranks that wrote it.
        tensors: canonical name -> entry.
        files: name of a shard file -> size and digest.
        numbers: JSON values of the state (step counts, scales, cursors).
        job: the resolved job.
        digest: sha256 of the manifest itself without this field.
    """

    step: int
    created: str
    world: int
    tensors: dict[str, Entry]
    files: dict[str, File]
    numbers: dict[str, Any]
    job: dict[str, Any]
    digest: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the shard files together."""
        return sum(file.bytes for file in self.files.values())

    def check(self, where: Path) -> None:
        """Pieces cover each tensor exactly, lie in listed files, and claim no more than the files hold."""
        claimed: dict[str, int] = defaultdict(int)
        for name, entry in self.tensors.items():
            if why := flaw((piece.box for piece in entry.pieces), entry.shape):
                raise CheckpointError(f"{where}: tensor {name}: {why}.")
            for piece in entry.pieces:
                if piece.file not in self.files:
                    raise CheckpointError(
                        f"{where}: tensor {name}: {piece.file} is not in the list of files."
                    )
                claimed[piece.file] += piece.box.numel * DTYPES[entry.dtype][1]
        for file, size in claimed.items():
            if size > self.files[file].bytes:
                held = self.files[file].bytes
                raise CheckpointError(
                    f"{where}: {file}: pieces claim {size} bytes of a file of {held} bytes."
                )

    def dump(self) -> bytes:
        """The manifest as the bytes of its file, with its own digest."""
        tensors = {
            name: {
                "shape": entry.shape,
                "dtype": entry.dtype,
                "pieces": [{**asdict(piece.box), "file": piece.file} for piece in entry.pieces],
            }
            for name, entry in self.tensors.items()
        }
        body = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "created": self.created,
            "world": self.world,
            "tensors": tensors,
            "files": {name: asdict(file) for name, file in self.files.items()},
            "numbers": self.numbers,
            "job": self.job,
        }
        return json.dumps({**body, "digest": _digest(body)}, allow_nan=False).encode()


def read_manifest(path: Path) -> Manifest:
    """Read and check the manifest of a checkpoint folder; raises CheckpointError naming what is wrong.

    Files are not opened: `headway.parallel.checkpoint.verify` does that.
    """
    where = Path(path) / MANIFEST
    try:
        with open(where, "rb") as file:
            raw = file.read(LARGEST + 1)
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be read: {error.strerror}.") from error
    if len(raw) > LARGEST:
        raise CheckpointError(f"{where}: has more than {LARGEST} bytes, the most a manifest may have.")
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: is not JSON: {error}.") from error
    return _parse(body, where)


def check_json(value: Any, where: str) -> None:
    """Values must come back from JSON as they went in; raises CheckpointError naming one that would not."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{where}: key {key!r} is no string, as JSON wants.")
            check_json(item, f"{where}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_json(item, f"{where}[{index}]")
    elif type(value) is float and (value != value or abs(value) == float("inf")):
        raise CheckpointError(
            f"{where} = {value}: JSON has no such number; leave it out or save it as a tensor."
        )
    elif value is not None and type(value) not in (bool, int, float, str):
        raise CheckpointError(f"{where} = {value!r}: {type(value).__name__} is no JSON value.")


def _digest(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _parse(body: Any, where: Path) -> Manifest:
    def fail(what: str, found: object, expected: str) -> CheckpointError:
        return CheckpointError(f"{where}: {what} is {_short(found)}, expected {expected}.")

    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise fail("format", body.get("format") if isinstance(body, dict) else body, repr(FORMAT))
    if body.get("version") != VERSION:
        raise fail("version", body.get("version"), str(VERSION))
    stated = body.pop("digest", None)
    if stated != (found := _digest(body)):
        raise fail("digest of the manifest's content", found, f"the {_short(stated)} that it states")
    for key, kind in (("created", str), ("tensors", dict), ("files", dict), ("numbers", dict), ("job", dict)):
        if not isinstance(body.get(key), kind):
            raise fail(key, body.get(key), f"a JSON {kind.__name__}")
    for key in ("step", "world"):
        if not _sizes([body.get(key)]):
            raise fail(key, body.get(key), "a whole number")
    files: dict[str, File] = {}
    for name, file in body["files"].items():
        # The name becomes a path: nothing but a shard's own name may pass.
        if not _FILE.fullmatch(name):
            raise fail("name of a file", name, "shard_NNNNN.safetensors")
        if not (isinstance(file, dict) and _sizes([file.get("bytes")]) and _hex(file.get("sha256"))):
            raise fail(f"entry of {name}", file, "bytes and sha256")
        files[name] = File(file["bytes"], file["sha256"])
    tensors = {}
    for name, entry in body["tensors"].items():
        if not isinstance(entry, dict) or not _sizes(entry.get("shape")) or entry.get("dtype") not in DTYPES:
            raise fail(f"entry of tensor {name}", entry, "shape, a known dtype and pieces")
        tensors[name] = Entry(tuple(entry["shape"]), entry["dtype"], _pieces(entry, name, fail))
    manifest = Manifest(
        **{key: body[key] for key in ("step", "created", "world", "numbers", "job")},
        tensors=tensors,
        files=files,
        digest=stated,
    )
    manifest.check(where)
    return manifest


def _pieces(entry: dict[str, Any], name: str, fail: Any) -> tuple[Piece, ...]:
    pieces = entry.get("pieces")
    if not isinstance(pieces, list):
        raise fail(f"pieces of tensor {name}", pieces, "a list")
    for piece in pieces:
        if not (
            isinstance(piece, dict)
            and _sizes(piece.get("offset"))
            and _sizes(piece.get("shape"))
            and len(piece["offset"]) == len(piece["shape"]) == len(entry["shape"])
            and all(piece["shape"])
            and isinstance(piece.get("file"), str)
        ):
            raise fail(
                f"a piece of tensor {name}", piece, f"offset, shape (of {len(entry['shape'])} dims) and file"
            )
    return tuple(Piece(Box(tuple(p["offset"]), tuple(p["shape"])), p["file"]) for p in pieces)


def _sizes(value: Any) -> bool:
    """A list of whole numbers that fit into 63 bits (true and false are no numbers here)."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _hex(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
