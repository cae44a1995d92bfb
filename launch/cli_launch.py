"""`headway launch`: runs on a cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from headway.launch.arguments import Debug, Recipes, RunPath, Sets, option

app = typer.Typer(help="Start runs on a Slurm cluster, and look after them.", no_args_is_help=True)


@app.command()
def slurm(
    recipes: Recipes,
    sets: Sets = None,
    data_path: Annotated[
        str | None, typer.Option("--data", help="Corpus, as `headway train` takes it.")
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="YAML file of these options, of all runs on a cluster; or cluster/NAME."),
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes.", min=1)] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs of a node, a rank each.", min=0)] = None,
    tasks_per_node: Annotated[
        int | None, typer.Option(help="Ranks of a node, if not one a GPU.", min=1)
    ] = None,
    cpus_per_task: Annotated[int | None, typer.Option(help="Cores of a rank.", min=1)] = None,
    mem: Annotated[str | None, typer.Option(help="Memory of a node, as sbatch takes it.")] = None,
    partition: Annotated[str | None, typer.Option(help="Partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Account that pays.")] = None,
    qos: Annotated[str | None, typer.Option(help="Quality of service.")] = None,
    constraint: Annotated[str | None, typer.Option(help="Features that nodes must have.")] = None,
    reservation: Annotated[str | None, typer.Option(help="Reservation.")] = None,
    exclude: Annotated[str | None, typer.Option(help="Nodes to leave out: node[3,7].")] = None,
    time: Annotated[
        str | None, typer.Option(help="Time limit: minutes, h:mm:ss or days-h:mm:ss. 24:00:00.")
    ] = None,
    signal_before: Annotated[
        int | None, typer.Option(help="Seconds before the time limit at which ranks save.", min=1)
    ] = None,
    requeue: Annotated[
        bool | None, typer.Option("--requeue/--no-requeue", help="Start again when stopped.")
    ] = None,
    max_faults: Annotated[
        int | None,
        typer.Option(help="Faults in a row, with no checkpoint between, that are borne.", min=0),
    ] = None,
    exclude_after: Annotated[
        int | None, typer.Option(help="Faults on a node after which it is left out; 0 never.", min=0)
    ] = None,
    launcher: Annotated[
        str | None, typer.Option(help="srun: a task each rank; torchrun: an agent each node.")
    ] = None,
    interface: Annotated[str | None, typer.Option(help="Network interface of NCCL and gloo: ib0.")] = None,
    container: Annotated[str | None, typer.Option(help="Image in which ranks run.")] = None,
    container_runtime: Annotated[str | None, typer.Option(help="pyxis or apptainer.")] = None,
    container_mounts: Annotated[
        list[str] | None, typer.Option("--container-mount", help="HOST:INSIDE. May be repeated.")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(help="Variable of the ranks: NAME=VALUE. May be repeated.")
    ] = None,
    setup: Annotated[
        list[str] | None, typer.Option(help="Line of shell before the start. May be repeated.")
    ] = None,
    chain: Annotated[
        int, typer.Option(help="So many jobs, each goes on where the last one stopped.", min=1)
    ] = 1,
    sweep: Annotated[
        list[str] | None, typer.Option(help="a.b=1,2,3: an array of runs. May be repeated.")
    ] = None,
    sweep_parallel: Annotated[
        int | None, typer.Option(help="So many runs of a sweep at once.", min=1)
    ] = None,
    template: Annotated[str | None, typer.Option(help="Your own template of the script.")] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Set an existing run folder aside and begin anew.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script, submit nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Write a batch script for a run and submit it. It saves before its time is over, and starts again by itself."""
    options = dict(locals())
    from headway.launch.slurm import request, submit

    asked = {key: options[key] for key in request.Request.model_fields if key in options}
    asked["env"] = request.pairs("--env", env or [])
    submit.launch(
        recipes,
        [*(sets or []), *option("data.sources", json.dumps([data_path]) if data_path else None)],
        request.read_request(cluster, asked),
        chain=chain,
        sweeps=sweep or [],
        parallel=sweep_parallel,
        template=template,
        fresh=fresh,
        dry_run=dry_run,
    )


@app.command()
def template(debug: Debug = False) -> None:
    """Print the template of batch scripts, to be changed and given as --template."""
    from headway.launch.slurm import script

    print(script.template_text(), end="")


@app.command()
def status(run_path: RunPath, debug: Debug = False) -> None:
    """A run's jobs, and how far it has come."""
    from headway.launch.slurm import show

    show.status(run_path)


@app.command()
def logs(
    run_path: RunPath,
    lines: Annotated[int, typer.Option(help="Last lines that are shown.", min=1)] = 40,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with what is added.")] = False,
    debug: Debug = False,
) -> None:
    """The end of a run's log."""
    from headway.launch.slurm import show

    show.logs(run_path, lines, follow)


@app.command()
def cancel(
    run_path: RunPath,
    now: Annotated[bool, typer.Option("--now", help="Do not wait until they have saved.")] = False,
    debug: Debug = False,
) -> None:
    """End a run's jobs; those that run save first."""
    from headway.launch.slurm import show

    show.cancel(run_path, now)


@app.command(hidden=True)
def after(
    run: Path,
    code: Annotated[int, typer.Option()],
    asked: Annotated[bool, typer.Option("--asked")] = False,
    requeue: Annotated[bool, typer.Option("--requeue/--no-requeue")] = True,
    max_faults: Annotated[int, typer.Option()] = 3,
    exclude_after: Annotated[int, typer.Option()] = 2,
    debug: Debug = False,
) -> None:
    """What batch scripts call when the ranks have ended: start again, or not."""
    from headway.launch.slurm import after as ended

    rules = ended.Rules(requeue, max_faults, exclude_after)
    raise typer.Exit(ended.after(run, code, rules, asked=asked))
