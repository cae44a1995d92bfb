"""Images by number, whatever holds them: folders, WebDataset shards, Parquet tables, NumPy arrays, digits.

Every image has a name that is the same on every machine: its path below the source, its member's name within a
shard, or `FILE:ROW`, rows counted from 0. Which side of the held-out split it is on depends on that name alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headway.pretrain import config
from headway.pretrain.data.images.packed import EXTENSIONS, Index, index_tars, pack_tables
from headway.pretrain.data.images.source import UNLABELLED, ImageSource
from headway.pretrain.data.samples import Ints
from headway.pretrain.data.text import File, find_files
from headway.pretrain.errors import DataError
from headway.pretrain.files import cache_folder

_is_integer = re.compile("-?(0|[1-9][0-9]{0,17})").fullmatch
DIGITS = "sklearn:digits"
MOST_CLASSES = 1_000_000
PACKED = ("tar", "parquet", "npz")
"""Endings of files that hold many images."""


def open_images(source: config.Source, data: config.Data) -> ImageSource:
    """Open a source.

    Args:
        source: its path is `sklearn:digits`, a `.npz` of `images` (uint8 [N, H, W] or [N, H, W, C]) and `labels`, a
            folder of `images.npy` and `labels.npy`, `.tar` shards, `.parquet` tables, a folder for each class, or
            a folder of images without class.
        data: `images`, `heldout`, `on_error` and `cache` are read.

    Raises:
        DataError: there is nothing, or something else; labels that make no sense; a package is missing.
    """
    named = Path(source.path).expanduser()
    if source.path == DIGITS:
        return _digits(data)
    if (named / "images.npy").is_file():
        return _arrays(source.path, named / "images.npy", data)
    by_kind: dict[str, list[File]] = {}
    for file in find_files(source):
        by_kind.setdefault(_kind(file), []).append(file)
    by_kind.pop("other", None)
    if not by_kind:
        rule = f"no image, shard, table or array there: no file ends in .tar, .parquet, .npz, .{', .'.join(EXTENSIONS)}"
        raise DataError(f"{source.path}: {rule} (data.sources)")
    if len(by_kind) > 1:
        counts = ", ".join(f"{len(files)} {kind}" for kind, files in by_kind.items())
        raise DataError(
            f"{source.path}: holds {counts}; name one kind by a pattern such as '*.tar' (data.sources)"
        )
    ((kind, files),) = by_kind.items()
    if kind == "npz":
        if len(files) > 1:
            raise DataError(f"{source.path}: {len(files)} .npz files; name each as a source (data.sources)")
        return _arrays(source.path, files[0].path, data)
    return {"tar": _shards, "parquet": _tables, "image": _files}[kind](source.path, files, data)


def _kind(file: File) -> str:
    suffix = file.path.suffix.lower().removeprefix(".")
    tar = file.path.name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"))
    return "tar" if tar else "image" if suffix in EXTENSIONS else suffix if suffix in PACKED else "other"


def _common(data: config.Data) -> dict[str, Any]:
    return {"channels": data.images.channels, "heldout": data.heldout, "on_error": data.on_error}


def _files(name: str, files: Sequence[File], data: config.Data) -> ImageSource:
    """Images in a folder for each class (classes sorted by name, as torchvision's ImageFolder does) or in none."""
    parents = [file.name.split("/")[0] if "/" in file.name else None for file in files]
    classes = sorted({parent for parent in parents if parent is not None})
    numbers = {parent: i for i, parent in enumerate(classes)}
    labels = [UNLABELLED if parent is None else numbers[parent] for parent in parents]
    paths, names = [str(file.path) for file in files], [file.name for file in files]
    return ImageSource(
        name,
        classes,
        np.array(labels, dtype=np.int64),
        names,
        lambda i: Path(paths[i]).read_bytes(),
        lambda i: paths[i],
        **_common(data),
    )


def _shards(name: str, files: Sequence[File], data: config.Data) -> ImageSource:
    index = index_tars(files, data.images.label, cache_folder(data.cache))
    paths = [file.path for file in files]
    return _packed(name, index, paths, lambda i: f"{paths[index.files[i]]}: {index.names[i]}", data)


def _tables(name: str, files: Sequence[File], data: config.Data) -> ImageSource:
    index, packed = pack_tables(files, data.images.column, data.images.label, cache_folder(data.cache))
    paths = {file.name: file.path for file in files}

    def where(i: int) -> str:
        file, _, row = index.names[i].rpartition(":")
        return f"{paths[file]}:{row}"

    return _packed(name, index, [packed], where, data)


def _packed(
    name: str, index: Index, paths: Sequence[Path], where: Callable[[int], str], data: config.Data
) -> ImageSource:
    if not index.names:
        raise DataError(f"{name}: holds no image (data.sources)")
    classes, labels = number_labels(index.labels, index.classes, where)

    def load(i: int) -> bytes:
        with paths[index.files[i]].open("rb", buffering=0) as file:
            file.seek(index.starts[i])
            return file.read(index.sizes[i]) or b""

    return ImageSource(name, classes, labels, index.names, load, where, **_common(data))


def number_labels(
    texts: Sequence[str | None], classes: Sequence[str] | None, where: Callable[[int], str]
) -> tuple[list[str], Ints]:
    """Classes and their numbers from labels as text.

    Integers are the classes' numbers, -1 stands for none; other texts are their names, numbered as sorted.

    Returns:
        Names of the classes, and int64 [N], UNLABELLED where there is none.

    Raises:
        DataError: an integer is negative, absurdly large, or beyond the named classes.
    """
    present = sorted({text for text in texts if text is not None})
    if all(map(_is_integer, present)):
        numbers = {text: int(text) for text in present}
        largest = max(numbers.values(), default=UNLABELLED)
        limit = len(classes) if classes else MOST_CLASSES
        for text, number in numbers.items():
            if not UNLABELLED <= number < limit:
                place = where(list(texts).index(text))
                raise DataError(f"{place}: class {text} is not in 0 to {limit - 1} (data.images.label)")
        known = list(classes or map(str, range(largest + 1)))
    else:
        known = list(classes or present)
        numbers = {text: i for i, text in enumerate(known)}
        if unknown := [text for text in present if text not in numbers]:
            place = where(list(texts).index(unknown[0]))
            raise DataError(f"{place}: {unknown[0]!r} is none of the named classes (data.images.label)")
    labels = [UNLABELLED if text is None else numbers[text] for text in texts]
    return known, np.array(labels, dtype=np.int64)


def _arrays(name: str, path: Path, data: config.Data) -> ImageSource:
    """A `.npz`, which is read whole, or a memory-mapped `images.npy` beside `labels.npy`."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in ("images", "labels") if key in file.files}
        else:
            arrays = {"images": np.load(path, mmap_mode="r", allow_pickle=False)}
            if path.with_name("labels.npy").is_file():
                arrays["labels"] = np.load(path.with_name("labels.npy"), allow_pickle=False)
    except (OSError, ValueError, EOFError) as fault:
        raise DataError(f"{path}: cannot be read as arrays: {fault}") from fault
    if "images" not in arrays:
        raise DataError(f"{path}: holds no array `images`")
    return _from_arrays(name, str(path), path.name, arrays["images"], arrays.get("labels"), data)


def _digits(data: config.Data) -> ImageSource:
    """1,797 handwritten digits of 8 x 8 pixels (UCI, as scikit-learn ships them), 0 to 16 scaled to 0 to 255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as fault:
        rule = "needs scikit-learn, which is not installed: pip install 'headway[vision]'"
        raise DataError(f"{DIGITS}: {rule}") from fault
    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    source = _from_arrays(DIGITS, DIGITS, DIGITS, pixels, bunch.target, data)
    source.in_order = True  # other people wrote the last third: published numbers hold out these
    return source


def _from_arrays(
    name: str, place: str, prefix: str, pixels: Any, labels: Any | None, data: config.Data
) -> ImageSource:
    legal = pixels.ndim == 3 or (pixels.ndim == 4 and pixels.shape[3] in (1, 3))
    if pixels.dtype != np.uint8 or not legal or not pixels.size:
        found = f"{pixels.dtype} {list(pixels.shape)}"
        raise DataError(
            f"{place}: images are {found}, must be uint8 [N, H, W] or [N, H, W, C] of 1 or 3 channels"
        )
    labels = np.full(len(pixels), UNLABELLED) if labels is None else labels
    if labels.shape != (len(pixels),) or not np.issubdtype(labels.dtype, np.integer):
        found = f"{labels.dtype} {list(labels.shape)}"
        raise DataError(f"{place}: labels are {found}, must be integers [{len(pixels)}], one for each image")

    def where(i: int) -> str:
        return f"{place}:{i}"

    counts = Counter(labels.tolist())
    classes, _ = number_labels([str(label) for label in counts], None, lambda _: place)
    names = [f"{prefix}:{i}" for i in range(len(pixels))]
    numbers = labels.astype(np.int64)
    return ImageSource(
        name, classes, numbers, names, lambda i: pixels[i], where, **_common(data), encoded=False
    )
