"""`headway attention`: mechanisms, and what they cost here."""

from __future__ import annotations

from typing import Annotated

import typer

from headway.launch.arguments import Debug

app = typer.Typer(help="List attention mechanisms, and compare their costs here.", no_args_is_help=True)


@app.command()
def ls(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    tokens: Annotated[int, typer.Option(help="Length that costs are given for.", min=16)] = 4096,
    debug: Debug = False,
) -> None:
    """Every mechanism: formula, cost, what it supports, source."""
    from headway.launch import attention as mechanisms

    mechanisms.ls(as_json, tokens)


@app.command()
def compare(
    seq: Annotated[str, typer.Option(help="Lengths, separated by commas.")] = "512,2048,8192",
    names: Annotated[list[str] | None, typer.Argument(help="Mechanisms; all if none are named.")] = None,
    limit: Annotated[float, typer.Option(help="Seconds that one call may take.")] = 20.0,
    out: Annotated[str, typer.Option(help="Folder for the table and the plot.")] = "runs/attention",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    threads: Annotated[int | None, typer.Option(help="Of the CPU; PyTorch's choice if not given.")] = None,
    debug: Debug = False,
) -> None:
    """Time and peak memory of forward and backward of every mechanism here, with a log-log plot."""
    from headway.launch import attention as mechanisms

    mechanisms.compare(numbers("--seq", seq), names or [], limit, out, dtype, threads)


@app.command()
def zoo(
    names: Annotated[list[str] | None, typer.Argument(help="Mechanisms; all if none are named.")] = None,
    recipe: Annotated[
        list[str] | None, typer.Option(help="gpt/tiny, bert/tiny or vit/tiny. May be repeated.")
    ] = None,
    out: Annotated[str, typer.Option(help="Folder for the runs, the table and the plot.")] = "runs/zoo",
    debug: Debug = False,
) -> None:
    """Train small recipes with every mechanism that suits them: held-out loss beside the time of a step."""
    from headway.launch import zoo as runs

    runs.zoo(recipe or [], names or [], out)


def numbers(option: str, given: str) -> list[int]:
    """Whole numbers separated by commas."""
    from headway.pretrain.errors import JobError

    try:
        return [int(part) for part in given.split(",")]
    except ValueError:
        raise JobError(option, given, "whole numbers separated by commas", "512,2048") from None
