"""Implementations by others that cannot be installed beside torch: `make` puts them into a folder of their own."""

import sys
from functools import cache
from pathlib import Path

import pytest
import torch

FOLDER = Path(sys.prefix) / "oracles"


@cache
def timm():
    """timm. It imports torchvision, whose wheel loads beside torch's CUDA build only, and asks for its operators."""
    _open()
    if "timm" in sys.modules:  # imported through this file's other name
        return sys.modules["timm"]
    try:
        torch.ops.load_library(FOLDER / "torchvision" / "_C.so")
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        timm.library = library  # operators live as long as this does
    import timm as module

    return module


def package_folder(name: str) -> Path:
    """Folder of a package that ships data or weights."""
    _open()
    return FOLDER / name


def _open() -> None:
    if not FOLDER.is_dir():
        pytest.fail(f"{FOLDER} is missing: `make test` installs what the tests compare with")
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
