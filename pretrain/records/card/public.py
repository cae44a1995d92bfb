"""What of a setting may be shown to the world: a card is published, and paths tell names of people and machines."""

from __future__ import annotations

import json
from pathlib import PurePath
from typing import Any


def public_name(path: str) -> str:
    """A source without the folders above it: `stdlib`, `text.jsonl`, `sklearn:digits`."""
    return path.removesuffix(":") if _named(path) else PurePath(path).name or path


def public(value: Any) -> str:
    """A setting as a recipe spells it, absolute paths cut to their last part."""
    cut = _cut(value)
    return cut if isinstance(cut, str) else json.dumps(cut, ensure_ascii=False, default=str)


def _cut(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(("/", "~")):
        return f".../{PurePath(value).name}"
    if isinstance(value, dict):
        return {key: _cut(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_cut(item) for item in value]
    return value


def cell(value: Any) -> str:
    """Text within a Markdown table: on one line, with neither bars nor tags of its own."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")
    return text.replace("|", "\\|").replace("`", "'")


def _named(path: str) -> bool:
    """Whether it is no path, but the name of something that is built in."""
    return ":" in path and "/" not in path
