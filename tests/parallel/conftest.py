"""Fixtures of the tests that need several ranks, and the account of what they proved."""

from typing import Any

from headway.tests.parallel import proof

from .pool import pool

__all__ = ["pool"]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Tell which layouts were proved in this process and how well."""
    if lines := proof.summary():
        terminalreporter.section("curves of layouts")
        for line in lines:
            terminalreporter.write_line(line)
