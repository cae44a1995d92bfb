"""Where tests find Triton: torch's CUDA builds bring it, else it is with the oracles."""

import sys
from importlib.util import find_spec

from headway.tests import oracles


def find_triton() -> bool:
    """Make Triton importable, if it is anywhere."""
    if find_spec("triton") is None and (oracles.FOLDER / "triton").is_dir():
        sys.path.append(str(oracles.FOLDER))
    return find_spec("triton") is not None
