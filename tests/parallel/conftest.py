"""Fixtures of the tests that need several ranks."""

from .pool import pool

__all__ = ["pool"]
