"""Reads a file of JSON lines as it grows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

Rows = list[dict[str, Any]]


class Tail:
    """The rows of a file that is appended to, whose last line may be amended, and that may be replaced by another.

    `MetricsFile` does all three: steps are appended, an evaluation rewrites the last line, and a run that goes on
    from a checkpoint publishes a shorter file under the same name.

    Attributes:
        changed: when the file was last written to, in seconds since the epoch; 0 if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._forget()

    def _forget(self) -> None:
        self._identity: tuple[int, int] | None = None
        self._last, self._start = b"", 0
        self.changed = 0.0

    def read(self) -> tuple[bool, Rows]:
        """Whether the file is another than at the last call, of which nothing holds any more; and the new rows.

        A row whose line was amended comes again. A line without an end waits until it is whole, and so does a last
        line that is no JSON object; in the middle such a line is left out.
        """
        try:
            file = open(self._path, "rb")  # noqa: SIM115 - closed below
        except OSError:
            gone = self._identity is not None
            self._forget()
            return gone, []
        with file:
            facts = os.fstat(file.fileno())
            identity = (facts.st_dev, facts.st_ino)
            other = self._identity not in (None, identity) or not self._goes_on(file)
            if other:
                self._forget()
            self._identity, self.changed = identity, facts.st_mtime
            file.seek(self._start)
            return other, self._take(file)

    def _goes_on(self, file: BinaryIO) -> bool:
        """Whether the last line still stands where it was, perhaps with more in it. The file's number does not say
        so alone: of a file that is gone it is given to the next one."""
        if not self._last:
            return True
        file.seek(self._start)
        line = file.readline()
        if line == self._last:
            return True
        before, after = _parse(self._last) or {}, _parse(line) or {}
        return all(name in after and after[name] == value for name, value in before.items())

    def _take(self, file: BinaryIO) -> Rows:
        rows, start = [], self._start
        for line in file:
            if line != self._last or start != self._start:
                if not line.endswith(b"\n"):
                    break
                if row := _parse(line):
                    rows.append(row)
                    self._last, self._start = line, start
            start += len(line)
        return rows


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
