"""Model code is written for one device: nothing distributed may enter it."""

import re
from pathlib import Path

import headway

ROOT = Path(headway.__path__[0])
ROOMS = ("kernels", "pretrain/models", "pretrain/objectives")


def test_nothing_distributed_in_model_code():
    files = [f for room in ROOMS for f in (ROOT / room).rglob("*.py")]
    assert len(files) > 15
    for file in files:
        found = re.search(r"torch\.distributed|DTensor|\bmesh\b|DeviceMesh", file.read_text())
        assert found is None, f"{file}: {found}"
