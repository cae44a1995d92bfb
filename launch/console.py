"""The console that commands print to."""

import sys

from rich.console import Console

PIPE_WIDTH = 200
"""Columns where there is no terminal: tables go to files and other programs unbroken."""


def console() -> Console:
    """A console as wide as the terminal, or wide enough for tables where there is none."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
