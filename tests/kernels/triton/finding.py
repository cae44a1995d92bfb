"""Where tests find Triton: torch's CUDA builds bring it, else it is with the oracles."""

import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, MetadataPathFinder
from importlib.metadata import DistributionFinder as Finder
from importlib.util import find_spec
from typing import Any

from headway.tests import oracles


class Alone:
    """Finds Triton among the oracles, and nothing else there: others would take the rest for installed."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(oracles.FOLDER)]) if name == "triton" else None

    @staticmethod
    def find_distributions(context: Any) -> Iterable[Distribution]:
        """Its metadata, in which it finds its backends."""
        if context.name not in (None, "triton"):
            return ()
        return MetadataPathFinder.find_distributions(
            Finder.Context(name="triton", path=[str(oracles.FOLDER)])
        )


def find_triton() -> bool:
    """Make Triton importable, if it is anywhere."""
    if find_spec("triton") is None and (oracles.FOLDER / "triton").is_dir():
        sys.meta_path.append(Alone)  # type: ignore[arg-type]
    return find_spec("triton") is not None
