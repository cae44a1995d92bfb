"""Every format of source: the same images, classes and split, whatever holds them; faults are named."""

import io
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headway.pretrain import config
from headway.pretrain.data.images.sources import number_labels, open_images
from headway.pretrain.errors import DataError
from headway.tests import oracles

SEEDS = range(12)


def write_folder(root, files):
    for seed in SEEDS:
        place = root / f"class{seed % 3}" / f"{seed:02}.{'png' if seed % 2 else 'JPG'}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(files.png(seed) if seed % 2 else files.jpeg(seed))
    (root / "README.md").write_text("not an image")
    return root


def write_shards(root, files, label="cls", text=lambda seed: f"{seed % 3}\n"):
    root.mkdir(parents=True, exist_ok=True)
    for shard in range(2):
        with tarfile.open(root / f"{shard:05}.tar", "w") as tar:
            for seed in list(SEEDS)[shard::2]:
                members = {f"a.b/{seed:03}.png": files.png(seed), f"a.b/{seed:03}.json": b"{}"}
                if text:
                    members[f"a.b/{seed:03}.{label}"] = text(seed).encode()
                for name, body in members.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(body)
                    tar.addfile(info, io.BytesIO(body))
    return root


def write_table(path, files, labels, struct=True, metadata=None):
    images = [files.png(seed) for seed in SEEDS]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = pa.array([{"bytes": x, "path": None} for x in images], kind) if struct else pa.array(images)
    table = pa.table({"image": values} | ({} if labels is None else {"label": labels}))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=5)
    return path


def opened(path, data):
    return open_images(config.Source(path=str(path)), data)


def pixels_of(source):
    return [np.asarray(source.raw(i)[0]) for i in range(len(source))]


def test_a_folder_is_torchvisions_image_folder(tmp_path, files, settings):
    root = write_folder(tmp_path / "photos", files)
    oracles.timm()  # puts torchvision on the path
    from torchvision.datasets import ImageFolder

    theirs, ours = ImageFolder(str(root)), opened(root, settings())
    assert ours.classes == theirs.classes
    assert len(ours) == len(theirs) == len(SEEDS)
    for i, (image, label) in enumerate(theirs):
        assert ours.raw(i)[1] == label
        assert np.array_equal(np.asarray(ours.raw(i)[0]), np.asarray(image))


def test_a_folder_without_classes_is_unlabelled(tmp_path, files, settings):
    (tmp_path / "flat").mkdir()
    for seed in SEEDS:
        (tmp_path / "flat" / f"{seed}.png").write_bytes(files.png(seed))
    source = opened(tmp_path / "flat", settings(heldout=0.0))
    assert source.classes == []
    assert source.side(False, labelled=False).size == len(SEEDS)
    with pytest.raises(DataError, match=r"flat/0\.png: no class, nor have 11 others"):
        source.side(False)


@pytest.mark.parametrize("form", ["shards", "own_extension", "table", "bytes", "glob", "npz", "npy"])
def test_packed_sources_give_their_images_and_classes(tmp_path, files, settings, form):
    pixels = np.stack([files.pixels(seed) for seed in SEEDS])
    labels = np.array([seed % 3 for seed in SEEDS], np.int32)
    order, data = list(SEEDS), settings()
    if form in ("shards", "own_extension"):
        order = [*SEEDS[::2], *SEEDS[1::2]]
        label = "cls" if form == "shards" else "Class"
        data = settings(label="label" if form == "shards" else "Class")
        path = write_shards(tmp_path / "shards", files, label)
    elif form == "npz":
        np.savez(path := tmp_path / "x.npz", images=pixels, labels=labels)
    elif form == "npy":
        (path := tmp_path / "arrays").mkdir()
        np.save(path / "images.npy", pixels)
        np.save(path / "labels.npy", labels)
    else:
        path = write_table(tmp_path / "t" / "x.parquet", files, pa.array(labels), struct=form == "table")
        path = path.with_name("*.parquet") if form == "glob" else path
    for _ in range(2):  # the second time from the cache
        source = opened(path, data)
        assert source.classes == ["0", "1", "2"]
        assert source.labels.tolist() == [seed % 3 for seed in order]
        assert all(np.array_equal(a, pixels[seed]) for a, seed in zip(pixels_of(source), order, strict=True))


def test_array_images_of_one_channel(tmp_path, settings):
    grey = np.random.default_rng(0).integers(0, 256, (5, 6, 7), dtype=np.uint8)
    for name, array in (("flat", grey), ("deep", grey[..., None])):
        np.savez(tmp_path / f"{name}.npz", images=array)
        source = opened(tmp_path / f"{name}.npz", settings(channels=1))
        assert np.array_equal(np.stack(pixels_of(source)), grey)
        source = opened(tmp_path / f"{name}.npz", settings(channels=3))
        assert np.array_equal(np.stack(pixels_of(source)), np.repeat(grey[..., None], 3, -1))


def test_digits_are_scikit_learns(settings):
    from sklearn.datasets import load_digits

    bunch, source = load_digits(), opened("sklearn:digits", settings(channels=1, heldout=1 / 3))
    assert (len(source), source.classes) == (1797, [str(i) for i in range(10)])
    assert np.array_equal(source.labels, bunch.target)
    # 16 levels over 255: rounding moves a value by half a level of 255 at most.
    assert np.abs(np.stack(pixels_of(source)) - bunch.images * 255 / 16).max() <= 0.5
    # The split is part of every published number: the last third, in scikit-learn's order.
    assert np.array_equal(source.side(True), np.arange(1198, 1797))
    assert np.array_equal(source.side(False), np.arange(1198))


def test_the_split_depends_on_names_alone(tmp_path, files, settings):
    root = write_folder(tmp_path / "a", files)
    (root / "class0" / ".hidden.png").write_text("not seen")
    source = opened(root, settings(heldout=0.5))
    assert len(source) == len(SEEDS)
    held = {source.names[i] for i in source.side(True)}
    assert 0 < len(held) < len(SEEDS)
    assert set(source.side(True)) | set(source.side(False)) == set(range(len(SEEDS)))
    more = write_folder(tmp_path / "elsewhere" / "b", files)
    (more / "aaa").mkdir()
    (more / "aaa" / "first.png").write_bytes(files.png(99))
    os.remove(more / "class1" / "01.png")
    other = opened(more, settings(heldout=0.5))
    still = {other.names[i] for i in other.side(True)} - {"aaa/first.png"}
    assert still == held - {"class1/01.png"}
    larger = opened(more, settings(heldout=0.7))
    assert still <= {larger.names[i] for i in larger.side(True)}


def test_members_keep_their_side_in_other_shards(tmp_path, files, settings):
    data = settings(heldout=0.5)
    split = opened(write_shards(tmp_path / "a", files), data)
    with tarfile.open(tmp_path / "one.tar", "w") as tar:
        for shard in sorted((tmp_path / "a").iterdir()):
            with tarfile.open(shard) as old:
                for member in old:
                    tar.addfile(member, old.extractfile(member))
    whole = opened(tmp_path / "one.tar", data)
    sides = [{source.names[i] for i in source.side(True)} for source in (split, whole)]
    assert sides[0] == sides[1] != set()


def test_names_of_hugging_faces_classes(tmp_path, files, settings):
    info = b'{"info": {"features": {"label": {"names": ["cat", "ant", "bee"], "_type": "ClassLabel"}}}}'
    labels = [seed % 3 if seed else -1 for seed in SEEDS]
    path = write_table(tmp_path / "x.parquet", files, pa.array(labels), metadata={b"huggingface": info})
    source = opened(path, settings())
    assert source.classes == ["cat", "ant", "bee"]
    assert source.labels.tolist() == labels


def test_labels_as_text_are_sorted_and_checked():
    assert number_labels(["b", None, "a"], None, str)[0] == ["a", "b"]
    assert number_labels(["b", None, "a"], None, str)[1].tolist() == [1, -1, 0]
    assert number_labels(["10", "2"], None, str)[0] == [str(i) for i in range(11)]
    assert number_labels(["01", "2"], None, str)[0] == ["01", "2"]
    for texts, classes, fault in (
        (["0", "-2"], None, "1: class -2 is not in 0 to 999999"),
        (["1000000"], None, "0: class 1000000"),
        (["0", "2"], ["a", "b"], "1: class 2 is not in 0 to 1"),
        (["c"], ["a", "b"], "'c' is none of the named classes"),
    ):
        with pytest.raises(DataError, match=fault):
            number_labels(texts, classes, str)


def damaged_shard(tmp_path, files):
    path = write_shards(tmp_path / "s", files) / "00001.tar"
    path.write_bytes(path.read_bytes()[:5000])
    return tmp_path / "s"


def compressed_shard(tmp_path, files):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz"):
        return tmp_path / "x.tar.gz"


def twins(tmp_path, files):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("a.png", "a.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    return tmp_path / "x.tar"


def mixture(tmp_path, files):
    root = write_folder(tmp_path / "m", files)
    write_table(root / "x.parquet", files, None)
    return root


def arrays(**kind):
    def write(tmp_path, files):
        np.savez(tmp_path / "x.npz", **kind)
        return tmp_path / "x.npz"

    return write


def text_file(tmp_path, files):
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path / "notes.txt"


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (damaged_shard, r"00001\.tar: cannot be read as a tar file: unexpected end of data"),
        (compressed_shard, r"x\.tar\.gz: cannot be read as a tar file \(compressed shards"),
        (twins, r"x\.tar: a\.png and a\.jpg are two images of one sample"),
        (mixture, r"holds 12 image, 1 parquet; name one kind by a pattern"),
        (text_file, r"notes\.txt: no image, shard, table or array there"),
        (lambda tmp_path, files: tmp_path / "nowhere", "no such file"),
        (arrays(images=np.zeros((2, 3, 4))), r"images are float64 \[2, 3, 4\], must be uint8"),
        (arrays(images=np.zeros((2, 3, 4, 2), np.uint8)), r"images are uint8 \[2, 3, 4, 2\]"),
        (arrays(images=np.zeros((2, 3, 4), np.uint8), labels=np.zeros(3, int)), r"labels are int64 \[3\]"),
        (arrays(labels=np.zeros(3)), "holds no array `images`"),
        (arrays(images=np.array([None, 1])), "cannot be read as arrays"),
        (lambda t, f: write_table(t / "x.parquet", f, pa.array([0.5] * 12)), "'label' holds double"),
    ],
)
def test_faults_of_sources_are_named(tmp_path, files, settings, make, fault):
    with pytest.raises(DataError, match=fault):
        opened(make(tmp_path, files), settings())


def test_wrong_columns_are_named(tmp_path, files, settings):
    path = write_table(tmp_path / "x.parquet", files, pa.array(["a"] * 12))
    with pytest.raises(DataError, match=r"no column 'img'; it has image, label \(data\.images\.column\)"):
        opened(path, settings(column="img"))
    with pytest.raises(DataError, match="column 'label' holds string, not encoded images"):
        opened(path, settings(column="label"))
    with pytest.raises(DataError, match=r"x\.parquet:\d+: no class"):
        opened(path, settings(label="cls")).side(False)


def test_broken_images_are_named_by_place(tmp_path, files, settings):
    root = write_folder(tmp_path / "photos", files)
    (root / "class1" / "01.png").write_text("text")
    source = opened(root, settings())
    with pytest.raises(DataError, match=r"photos/class1/01\.png: cannot be decoded"):
        source.raw(source.names.index("class1/01.png"))
    os.remove(root / "class1" / "01.png")
    with pytest.raises(DataError, match=r"photos/class1/01\.png: cannot be read"):
        source.whole(source.names.index("class1/01.png"))
    shards = write_shards(tmp_path / "s", files)
    content = (shards / "00000.tar").read_bytes().replace(b"\x89PNG", b"nope", 1)
    (shards / "00000.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"00000\.tar: a\.b/000\.png: cannot be decoded"):
        opened(shards, settings()).raw(0)
    path = write_table(tmp_path / "x.parquet", files, None)
    table = pq.read_table(path)
    images = table["image"].to_pylist()
    images[7]["bytes"] = None
    pq.write_table(pa.table({"image": pa.array(images, table["image"].type)}), path)
    with pytest.raises(DataError, match=r"x\.parquet:7: empty"):
        opened(path, settings()).raw(7)


def test_images_without_class_are_left_out_and_counted_under_skip(tmp_path, files, settings):
    root = write_folder(tmp_path / "photos", files)
    (root / "stray.png").write_bytes(files.png(0))
    with pytest.raises(DataError, match=r"stray\.png: no class, nor have 0 others"):
        opened(root, settings(heldout=0.0)).side(False)
    source = opened(root, settings(heldout=0.0, on_error="skip"))
    assert source.side(False).size == len(SEEDS)
    assert source.skipped == 1
    assert source.skipped_first == [f"{root}/stray.png: no class"]
