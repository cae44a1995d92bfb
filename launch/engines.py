"""`headway config engines`: what each engine can do, and what a recipe asks of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from rich.table import Table

from headway.launch.console import console
from headway.parallel import mesh
from headway.parallel.engines.capabilities import ENGINES, features_of
from headway.parallel.engines.features import FEATURES
from headway.pretrain import device as devices
from headway.pretrain.recipe import resolve

DISTRIBUTIONS = {"native": "torch", "deepspeed": "deepspeed", "megatron": "megatron-core"}
"""Engine -> the package that it stands on."""

STYLES = {"tested": "green", "supported": "yellow", "refused": "red"}


def show(recipes: Sequence[str], sets: Sequence[str], ranks: int, as_json: bool = False) -> None:
    """Print features x engines; of a recipe, only what it asks for.

    Args:
        recipes: none for the whole table.
        ranks: over which a recipe is laid out.
    """
    wanted = list(FEATURES)
    if recipes:
        job = resolve(recipes, sets).job
        layout = mesh.lay_out(job.parallel, mesh.students(job, ranks))
        wanted = list(features_of(job, layout, devices.choose_device(job.parallel.device).type))
    if as_json:
        print(
            json.dumps(
                {name: {e: can[name]._asdict() for e, can in ENGINES.items()} for name in wanted}, indent=2
            )
        )
        return
    table = Table(box=None, header_style="bold")
    table.add_column("feature", no_wrap=True)
    for engine in ENGINES:
        table.add_column(f"{engine} ({_version(engine)})", overflow="fold")
    for name in wanted:
        cells = [can[name] for can in ENGINES.values()]
        table.add_row(name, *(_told(cell.status, cell.why) for cell in cells))
    console().print(table)
    print(
        "\ntested: by the tests of this repository, on CPUs. supported: not run where the tests run. refused: by name, "
        "before a process starts."
    )


def _told(status: str, why: str) -> str:
    word = f"[{STYLES[status]}]{status}[/]"
    return f"{word}: {why}" if why else word


def _version(engine: str) -> str:
    package = DISTRIBUTIONS[engine]
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} is not installed"
