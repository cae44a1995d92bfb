"""Damaged and hostile checkpoints: each is refused with a message that says which file, what and why."""

import hashlib
import json
import shutil

import pytest
import torch

from headway.parallel.checkpoint.load import load
from headway.parallel.checkpoint.manifest import LARGEST, read_manifest
from headway.parallel.checkpoint.save import Checkpointer
from headway.parallel.checkpoint.verify import newest_good, verify
from headway.pretrain.engine import State
from headway.pretrain.errors import CheckpointError

SHARD = "shard_00000.safetensors"


@pytest.fixture
def folder(tmp_path):
    """Three good checkpoints, steps 1 to 3."""
    with Checkpointer(tmp_path, keep_last=5, background=False) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, State({"w": torch.full((64, 8), float(step)), "b": torch.ones(5)}))
    assert len(checkpointer.published) == 3
    return tmp_path


def blank():
    return State({"w": torch.zeros(64, 8), "b": torch.zeros(5)})


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 4
    path.write_bytes(raw)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {
    "one flipped bit": (lambda p: flip(p / SHARD), SHARD, "sha256 is"),
    "truncated": (lambda p: truncate(p / SHARD), SHARD, "size is"),
    "longer": (lambda p: (p / SHARD).write_bytes((p / SHARD).read_bytes() + b"x"), SHARD, "size is"),
    "missing": (lambda p: (p / SHARD).unlink(), SHARD, "is missing"),
    "a folder instead": (lambda p: [(p / SHARD).unlink(), (p / SHARD).mkdir()], SHARD, "is missing"),
    "manifest altered": (lambda p: flip(p / "manifest.json"), "manifest.json", "manifest.json: "),
    "manifest truncated": (lambda p: truncate(p / "manifest.json"), "manifest.json", "is not JSON"),
    "manifest empty": (lambda p: (p / "manifest.json").write_bytes(b""), "manifest.json", "is not JSON"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_previous_good_one_is_found(folder, kind):
    damage, file, text = DAMAGE[kind]
    damage(folder / "step_00000003")
    problems = verify(folder / "step_00000003")
    assert [problem.file for problem in problems] == [folder / "step_00000003" / file]
    assert text in str(problems[0])
    state = blank()
    with pytest.raises(CheckpointError) as caught:
        load(folder / "step_00000003", state)
    assert file in str(caught.value)
    assert text in str(caught.value)
    if file == SHARD:
        assert f"The checkpoint before it is {folder / 'step_00000002'}" in str(caught.value)
    assert not state.tensors["w"].any(), "nothing is written from a damaged checkpoint"
    assert newest_good(folder) == (folder / "step_00000002", problems)


def test_a_flipped_bit_passes_only_where_asked(folder):
    state = blank()
    flip(folder / "step_00000003" / SHARD)
    load(folder / "step_00000003", state, verify=False)
    assert state.tensors["w"][0, 0] == 3


def test_several_bad_and_none_good(folder):
    for step in (1, 2, 3):
        flip(folder / f"step_{step:08d}" / SHARD)
        if step == 2:
            good, problems = newest_good(folder)
            assert good == folder / "step_00000003"
            assert problems == []
    good, problems = newest_good(folder)
    assert good is None
    assert [problem.file.parent.name[-1] for problem in problems] == ["3", "2", "1"]


def test_extra_files_are_problems_of_verification_only(folder):
    (folder / "step_00000003" / "notes.txt").write_text("hello")
    assert "notes.txt: the folder's content is an extra file" in str(verify(folder / "step_00000003")[0])
    load(folder / "step_00000003", blank())


def test_shards_of_two_checkpoints_are_not_mixed_up(folder):
    shutil.copy(folder / "step_00000002" / SHARD, folder / "step_00000003" / SHARD)
    assert "sha256" in str(verify(folder / "step_00000003")[0])


def rewrite(folder, change):
    """A manifest that was changed by someone who also mended its digest."""
    path = folder / "step_00000003" / "manifest.json"
    body = json.loads(path.read_text())
    body.pop("digest")
    change(body)
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({**body, "digest": hashlib.sha256(text.encode()).hexdigest()}))
    return path.parent


def setter(*keys):
    *way, last, value = keys

    def change(body):
        for key in way:
            body = body[key]
        body[last] = value

    return change


def rename_file(name):
    def change(body):
        body["files"][name] = body["files"].pop(SHARD)
        for entry in body["tensors"].values():
            for piece in entry["pieces"]:
                piece["file"] = name

    return change


W = ("tensors", "w")
HOSTILE = {
    "path that climbs": (rename_file("../../etc/passwd"), "name of a file is '../../etc/passwd'"),
    "absolute path": (rename_file("/etc/passwd"), "name of a file is '/etc/passwd'"),
    "path with a newline": (rename_file(SHARD + "\n"), "name of a file is"),
    "file that is not listed": (
        setter(*W, "pieces", 0, "file", "shard_00009.safetensors"),
        "shard_00009.safetensors is not in the list of files",
    ),
    "absurd shape": (setter(*W, "shape", [2**62, 2**62]), "tensor w: its pieces hold 512 of"),
    "absurd shape and piece": (
        lambda body: [
            setter(*W, "shape", [2**62, 8])(body),
            setter(*W, "pieces", 0, "shape", [2**62, 8])(body),
        ],
        f"{SHARD}: pieces claim 147573952589676412948 bytes of a file of",
    ),
    "negative size": (setter(*W, "shape", [-64, -8]), "entry of tensor w"),
    "size beyond 63 bits": (setter(*W, "shape", [2**70]), "entry of tensor w"),
    "size that is true": (setter(*W, "shape", [True, 8]), "entry of tensor w"),
    "too few pieces": (setter(*W, "pieces", []), "tensor w: its pieces hold 0 of 512 elements"),
    "piece outside": (setter(*W, "pieces", 0, "offset", [1, 0]), "does not lie inside"),
    "piece of other dims": (setter(*W, "pieces", 0, "offset", [0]), "a piece of tensor w"),
    "unknown dtype": (setter(*W, "dtype", "object"), "entry of tensor w"),
    "tensors is a list": (setter("tensors", []), r"tensors is \[\], expected a JSON dict"),
    "step is text": (setter("step", "3"), "step is '3'"),
    "other format": (setter("format", "pickle"), "format is 'pickle'"),
    "newer version": (setter("version", 2), "version is 2, expected 1"),
    "digest of a file": (setter("files", SHARD, "sha256", "zz"), f"entry of {SHARD}"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_manifests(folder, kind):
    change, text = HOSTILE[kind]
    path = rewrite(folder, change)
    with pytest.raises(CheckpointError, match=text) as caught:
        read_manifest(path)
    assert str(path / "manifest.json") in str(caught.value)
    assert len(str(caught.value)) < 500
    assert newest_good(folder)[0] == folder / "step_00000002"


@pytest.mark.parametrize("raw", [b"\xff\xfe", b"[" * 200_000, b"null", b"3", b'{"format": 1}', b"9" * 5000])
def test_manifests_that_are_no_manifests(folder, raw):
    (folder / "step_00000003" / "manifest.json").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"manifest\.json: "):
        read_manifest(folder / "step_00000003")


def test_a_giant_manifest_is_not_read_whole(folder):
    with open(folder / "step_00000003" / "manifest.json", "r+b") as file:
        file.truncate(LARGEST + 2)  # sparse
    with pytest.raises(CheckpointError, match="has more than 268435456 bytes"):
        read_manifest(folder / "step_00000003")


def shard(header, data=bytes(4096)):
    """A safetensors file, or something like it."""
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ((2**63).to_bytes(8, "little") + bytes(4096), "cannot be read"),  # a header of 8 EiB
        ((2**34).to_bytes(8, "little") + bytes(4096), "cannot be read"),
        (shard(b"not JSON at all!"), "cannot be read"),
        (shard(b'{"w":{"dtype":"F32","shape":[64,8],"data_offsets":[0,9999]}}'), "cannot be read"),
        (
            shard(b'{"w":{"dtype":"F32","shape":[1073741824,1073741824],"data_offsets":[0,4096]}}'),
            "cannot be read",
        ),
        (
            shard(b'{"v":{"dtype":"F32","shape":[64,8],"data_offsets":[0,2048]}}', bytes(2048)),
            "cannot be read",
        ),
        (
            shard(b'{"w":{"dtype":"F32","shape":[512,1],"data_offsets":[0,2048]}}', bytes(2048)),
            r"piece w is \('F32', \(512, 1\)\), the manifest says \('F32', \(64, 8\)\)",
        ),
    ],
)
def test_hostile_shards(folder, raw, text):
    """Shards that their digests vouch for, but that are no safetensors or hold other pieces."""
    (folder / "step_00000003" / SHARD).write_bytes(raw)

    def change(body):
        body["files"][SHARD] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        del body["tensors"]["b"]

    path = rewrite(folder, change)
    with pytest.raises(CheckpointError, match=text) as caught:
        load(path, State({"w": torch.zeros(64, 8)}))
    assert SHARD in str(caught.value)
