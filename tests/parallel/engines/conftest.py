"""Fixtures of the tests that need several ranks."""

from headway.tests.parallel.pool import pool

__all__ = ["pool"]
