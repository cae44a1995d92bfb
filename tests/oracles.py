"""Implementations by others that cannot be installed beside torch: `make` puts them into a folder of their own."""

import importlib.util
import sys
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch

FOLDER = Path(sys.prefix) / "oracles"
_LIBRARIES: list[torch.library.Library] = []


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
        _LIBRARIES.append(library)  # operators live as long as this does
    import timm as module

    return module


@cache
def file(path: str, absent: tuple[str, ...] = ()) -> ModuleType:
    """A file of a package as a module of its own, where the package itself asks for more than the file does.

    `absent`: what it imports and does not need here.
    """
    _check()
    name = "oracle_" + path.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, FOLDER / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    stubs = {name: mock.MagicMock() for name in absent}
    with mock.patch.dict(sys.modules, stubs), warnings.catch_warnings(action="ignore"):
        spec.loader.exec_module(module)
    return module


@cache
def vortex_convolution():
    """`fftconv_func` of vtx (Poli and others' Vortex). Its logging takes over the root logger and writes a file."""
    quiet = ModuleType("vortex.logging")
    quiet.activations_logger = None
    sys.modules.setdefault("vortex.logging", quiet)
    paths = list(sys.path)
    _open()
    try:
        from vortex.model.engine import fftconv_func
    finally:
        sys.path[:] = paths  # transformers would take the folder's torchvision for one that works
    return fftconv_func


@cache
def distillation():
    """`KDLoss` of torchdistill (Matsubara), and `kd_ce_loss` of TextBrewer."""
    return torchdistill().KDLoss, textbrewer().kd_ce_loss


@cache
def torchdistill():
    """Losses of torchdistill (Matsubara 2021)."""
    _open()
    import torchdistill.losses.mid_level as module

    return module


@cache
def textbrewer():
    """Losses of TextBrewer (Yang et al. 2020), whose trainers want tensorboard."""
    _open()
    with mock.patch.dict(sys.modules, {"torch.utils.tensorboard": mock.MagicMock()}):
        import textbrewer.losses as module
    return module


def package_folder(name: str) -> Path:
    """Folder of a package that ships data or weights."""
    _open()
    return FOLDER / name


def _check() -> None:
    if not FOLDER.is_dir():
        pytest.fail(f"{FOLDER} is missing: `make test` installs what the tests compare with")


def _open() -> None:
    _check()
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
