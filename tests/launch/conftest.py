"""Fixtures of the tests of whole runs."""

from headway.tests.parallel.pool import pool

__all__ = ["pool"]
