"""Arguments that several commands have."""

from typing import Annotated

import typer

Recipes = Annotated[list[str], typer.Argument(help="Recipe names (gpt/tiny) or YAML files; later ones win.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Override a setting: a.b=c. May be repeated.")]
RunPath = Annotated[str, typer.Argument(help="A run folder, e.g. runs/gpt-tiny.")]
OnError = Annotated[str | None, typer.Option(help="What malformed lines do: stop, or skip (and count).")]
Accelerate = Annotated[
    str | None,
    typer.Option("--accelerate", help="Config file of Accelerate; the job's layout by it.", metavar="FILE"),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def option(field: str, value: str | None) -> list[str]:
    """A setting that has an option of its own, as an override."""
    return [] if value is None else [f"{field}={value}"]
