"""Which cases of a test `make test` runs, and which are left to the matrix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def first(count: int, cases: Iterable[Any]) -> list[Any]:
    """Cases, of which all after so many are of the matrix; those that are marked already keep their marks alone."""
    return [case if i < count or hasattr(case, "marks") else _in_matrix(case) for i, case in enumerate(cases)]


def _in_matrix(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.matrix)
