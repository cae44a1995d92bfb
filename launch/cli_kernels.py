"""`headway kernels`: tiles of Triton kernels on this machine's GPU."""

from __future__ import annotations

from typing import Annotated

import typer

from headway.launch.arguments import Debug

app = typer.Typer(help="Choose tiles of Triton kernels by measuring them here.", no_args_is_help=True)


@app.command()
def tune(
    ops: Annotated[list[str] | None, typer.Argument(help="Ops; all if none are named.")] = None,
    size: Annotated[
        str | None, typer.Option(help="This size alone, by its name; all if left out.", metavar="NAME")
    ] = None,
    debug: Debug = False,
) -> None:
    """Measure all tiles that ops may be compiled with on this GPU, and keep the fastest for runs to come."""
    from headway.launch import kernels

    kernels.tune(ops or [], size)


@app.command()
def show(debug: Debug = False) -> None:
    """This GPU, whose tiles it is given, what was chosen by measuring and where that is kept, and all GPUs known."""
    from headway.launch import kernels

    kernels.show()
