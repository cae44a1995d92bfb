"""`headway config`: every setting with its origin, and the JSON schema of recipes."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from headway.launch.accelerate.job import expected_ranks, resolve_asked, tabulate
from headway.launch.console import console
from headway.pretrain.config import Job
from headway.pretrain.inert import inert
from headway.pretrain.recipe import DEFAULT, as_plain, leaves, one_line


def show(recipes: Sequence[str], sets: Sequence[str], accelerate: str | None = None) -> None:
    """Print every value with its origin; settings without effect are marked, with the reason. Of what Accelerate asks
    for (by a file, or by the variables of its launcher), print first what became of it."""
    resolved, asked = resolve_asked(recipes, sets, accelerate, expected_ranks(accelerate))
    if asked:
        console().print(tabulate(asked), "")
    useless = inert(resolved)
    table = Table(box=None, header_style="bold")
    for title in ("setting", "value", "origin", "note"):
        table.add_column(title, no_wrap=title in ("setting", "origin"), overflow="fold")
    for name, value in leaves(resolved.job):
        origin = resolved.origins.get(name, DEFAULT)
        plain = [as_plain(v) for v in value] if isinstance(value, list) else value
        style = "yellow" if name in useless else "dim" if origin == DEFAULT else None
        note = f"no effect: {useless[name]}" if name in useless else ""
        table.add_row(name, *(Text(each) for each in (one_line(plain), origin, note)), style=style)
    console().print(table)


def print_schema() -> None:
    """The JSON schema that editors use for completion and checks."""
    print(json.dumps(schema(), indent=2))


def schema() -> dict:
    """JSON schema of a recipe; descriptions are the docstrings of the settings."""
    return Job.model_json_schema()
