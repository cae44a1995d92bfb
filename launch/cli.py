"""The command line. Thin: it parses, calls one function of the room that does the work, and prints errors.

Heavy libraries are imported inside the commands, so that `headway --help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Literal

import typer

from headway.launch.arguments import Accelerate, Debug, OnError, Recipes, RunPath, Sets, option
from headway.launch.cli_attention import app as attention
from headway.launch.cli_kernels import app as kernels
from headway.launch.cli_launch import app as launch

app = typer.Typer(
    name="headway",
    help="Pretrain attention models: one recipe, any layout, one curve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Build and inspect token stores.", no_args_is_help=True)
tokenizer = typer.Typer(help="Train and inspect tokenizers.", no_args_is_help=True)
checkpoint = typer.Typer(help="List, verify and import checkpoints.", no_args_is_help=True)
config = typer.Typer(help="Show jobs and the schema of recipes.", no_args_is_help=True)
app.add_typer(data, name="data")
app.add_typer(tokenizer, name="tokenizer")
app.add_typer(checkpoint, name="checkpoint")
app.add_typer(config, name="config")
app.add_typer(attention, name="attention")
distill = typer.Typer(help="Keep what a teacher gives, for many students.", no_args_is_help=True)
app.add_typer(distill, name="distill")
app.add_typer(launch, name="launch")
app.add_typer(kernels, name="kernels")


@app.command()
def train(
    recipes: Recipes,
    sets: Sets = None,
    data_path: Annotated[
        str | None, typer.Option("--data", help="Corpus: file, glob, folder or store.")
    ] = None,
    nproc: Annotated[
        int | None, typer.Option(help="Start this many local ranks.", min=1, show_default="1")
    ] = None,
    accelerate: Accelerate = None,
    on_error: OnError = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Set an existing run folder aside and begin anew.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train, or go on with a run whose folder exists."""
    from headway.launch import local, run
    from headway.launch.accelerate.job import find_processes

    sets = [*(sets or []), *option("data.on_error", on_error)]
    sets += [f"data.sources=[{json.dumps(data_path)}]"] if data_path else []
    if starts := find_processes(accelerate, nproc):
        run.check(recipes, sets, starts.ranks, accelerate=accelerate)
        local.start(starts.local, sys.argv[1:], starts.hosts)
    else:
        run.train(recipes, sets, fresh=fresh, accelerate=accelerate)


@app.command("eval")
def evaluate(run_path: RunPath, sets: Sets = None, debug: Debug = False) -> None:
    """Loss and bits per byte of a run's newest checkpoint on its held-out documents."""
    from headway.launch import run

    run.evaluate(run_path, sets or [])


@app.command()
def look(run_path: RunPath, debug: Debug = False) -> None:
    """Rebuild a run's report.html from its records and newest checkpoint."""
    from headway.launch import run

    run.look(run_path)


@app.command()
def watch(
    paths: Annotated[
        list[str] | None, typer.Argument(help="Run folders, or folders of runs; runs/ if none is given.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Show them as they are now, and end.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between looks.", min=0.1)] = 2.0,
    svg: Annotated[str | None, typer.Option(help="Write the picture to this file, and end.")] = None,
    debug: Debug = False,
) -> None:
    """Show runs on the terminal as they go: of one its curves, speed, checkpoints and events; of several a line each.

    Reads the run folders alone: also runs on other machines can be watched that share the file system. Ends by itself
    when all runs are over; prints once where there is no terminal."""
    from headway.launch import watch as view

    view.watch(paths or ["runs"], once=once, interval=interval, svg=svg)


@app.command()
def card(
    run_path: RunPath,
    out: Annotated[
        str | None, typer.Option("--out", help="Folder to write into; the run's if left out.", metavar="DIR")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a run's MODEL_CARD.md (Hugging Face's format), DATA_SHEET.md and loss curve from its records."""
    from headway.launch import card as cards

    cards.write(run_path, out)


@data.command("build")
def data_build(recipes: Recipes, sets: Sets = None, on_error: OnError = None, debug: Debug = False) -> None:
    """Build the tokenizer and token stores of a recipe."""
    from headway.launch import corpus

    corpus.build(recipes, [*(sets or []), *option("data.on_error", on_error)])


@data.command("inspect")
def data_inspect(
    prefix: Annotated[str, typer.Argument(help="Store: path without .bin/.idx.")], debug: Debug = False
) -> None:
    """What a token store holds."""
    from headway.launch import corpus

    corpus.inspect(prefix)


@data.command("ledger")
def data_ledger(
    run_path: RunPath,
    no_data: Annotated[
        bool, typer.Option("--no-data", help="Trust the sizes of sources in the records; open no data.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Prove from a run's records that each sample was used exactly once an epoch."""
    from headway.launch import ledger

    ledger.show(run_path, open_data=not no_data)


@tokenizer.command("train")
def tokenizer_train(
    out: Annotated[str, typer.Argument(help="File to write, e.g. my.model.")],
    sources: Annotated[
        list[str], typer.Argument(help="Text, JSONL or Parquet files, globs, folders, stdlib:")
    ],
    vocab: Annotated[int, typer.Option(help="Number of pieces.", min=260)] = 32768,
    debug: Debug = False,
) -> None:
    """Train a lossless SentencePiece tokenizer."""
    from headway.launch import corpus

    corpus.train_tokenizer(out, sources, vocab)


@tokenizer.command("encode")
def tokenizer_encode(
    path: Annotated[str, typer.Argument(help="A .model, a tokenizer.json or 'bytes'.")],
    text: Annotated[str, typer.Argument(help="Text to cut into pieces.")],
    debug: Debug = False,
) -> None:
    """Show how a text is cut into pieces."""
    from headway.launch import corpus

    corpus.encode(path, text)


@checkpoint.command("ls")
def checkpoint_ls(run_path: RunPath, debug: Debug = False) -> None:
    """List a run's checkpoints."""
    from headway.launch import checkpoints

    checkpoints.show(run_path)


@checkpoint.command("verify")
def checkpoint_verify(run_path: RunPath, debug: Debug = False) -> None:
    """Check every digest of a run's checkpoints (or of one checkpoint)."""
    from headway.launch import checkpoints

    checkpoints.verify(run_path)


@checkpoint.command("import")
def checkpoint_import(
    folder: Annotated[str, typer.Argument(help="Folder with config.json and weights.", metavar="DIR")],
    kind: Annotated[str, typer.Option("--from", help="Where it comes from: hf (Hugging Face).")] = "hf",
    out: Annotated[
        str | None, typer.Option("--out", help="Run folder to write; runs/NAME if left out.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Turn a model of Hugging Face into a run that training goes on from."""
    from headway.launch import exchange

    exchange.import_model(kind, folder, out)


@app.command()
def export(
    place: Annotated[str, typer.Argument(help="A run folder, or a checkpoint.", metavar="RUN_OR_CHECKPOINT")],
    folder: Annotated[str, typer.Argument(help="New folder to write.", metavar="DIR")],
    kind: Annotated[str, typer.Option("--to", help="Where it goes: hf (Hugging Face).")] = "hf",
    average: Annotated[bool, typer.Option("--average", help="Averaged weights (optimizer.ema).")] = False,
    debug: Debug = False,
) -> None:
    """Write a checkpoint as a folder that `from_pretrained` of transformers loads."""
    from headway.launch import exchange

    exchange.export_model(place, kind, folder, average)


@config.command("show")
def config_show(
    recipes: Recipes,
    sets: Sets = None,
    accelerate: Accelerate = None,
    engine: Annotated[
        Literal["deepspeed"] | None, typer.Option(help="Print the configuration that this engine is given.")
    ] = None,
    ranks: Annotated[
        int, typer.Option("--nproc", help="Ranks over which `--engine` lays it out.", min=1)
    ] = 1,
    debug: Debug = False,
) -> None:
    """Every setting with its origin; settings without effect are marked. Before them, what becomes of a config file of
    Accelerate. With `--engine deepspeed`, the DeepSpeed JSON instead."""
    from headway.launch import deepspeed_json, settings

    if engine:
        return deepspeed_json.show(recipes, sets or [], ranks)
    settings.show(recipes, sets or [], accelerate)


@config.command("schema")
def config_schema(debug: Debug = False) -> None:
    """The JSON schema of recipes."""
    from headway.launch import settings

    settings.print_schema()


@config.command("engines")
def config_engines(
    recipes: Annotated[
        list[str] | None, typer.Argument(help="A recipe, to see what it asks for alone.")
    ] = None,
    sets: Sets = None,
    ranks: Annotated[int, typer.Option("--nproc", help="Ranks over which a recipe is laid out.", min=1)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Features x engines: tested, supported or refused, with the reason."""
    from headway.launch import engines

    engines.show(recipes or [], sets or [], ranks, as_json)


@distill.command("cache")
def distill_cache(
    recipes: Recipes,
    out: Annotated[str, typer.Option("--out", help="New folder of the cache.", metavar="DIR")],
    sets: Sets = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="Of queries, keys, values and hidden states: bf16, fp32, fp64, or auto: the teacher's. "
            "Logits and what else is small have fp32 at least."
        ),
    ] = "auto",
    nproc: Annotated[int, typer.Option(help="Start this many local ranks.", min=1)] = 1,
    debug: Debug = False,
) -> None:
    """Run a job's teacher over the samples that its steps draw, once, and keep all that any step needs of it.

    Runs with `objective.distill.cache=DIR` read it, at any layout, without the teacher. The job's own layout may have
    data axes only here; `parallel.teacher` spreads the teacher. Interrupted, it goes on when it is started again."""
    from headway.launch import distill as caches
    from headway.launch import local

    if nproc > 1:
        caches.check(recipes, sets or [], out, dtype, nproc)
        local.start(nproc, sys.argv[1:])
    else:
        caches.cache(recipes, sets or [], out, dtype)


def main() -> None:
    """Run the command line; every error becomes one message and its exit code, with --debug a traceback."""
    try:
        app()
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        code = explain(error)
        leave_at_once(error, code)
        sys.exit(code)


def leave_at_once(error: Exception, code: int) -> None:
    """End without the destructors of process groups, which may wait for a rank that is lost."""
    from headway.pretrain.errors import LostRanksError, StartError

    if isinstance(error, LostRanksError | StartError):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def explain(error: Exception) -> int:
    """Print an error as one message that names the rank, if there are several; returns the exit code."""
    from headway.launch.environment import Ranks, find_ranks
    from headway.pretrain.errors import HeadwayError, Interrupted, JobError

    try:
        ranks = find_ranks()
    except JobError:  # the error itself, or told after it is mended
        ranks = Ranks()
    who = f"headway (rank {ranks.rank})" if ranks.spread else "headway"
    if not isinstance(error, HeadwayError):
        first = (str(error).strip().splitlines() or ["no message"])[0]
        place = keep_traceback()
        print(f"{who}: unexpected {type(error).__name__}: {first} (traceback: {place})", file=sys.stderr)
        return HeadwayError.exit_code
    if ranks.rank == 0 or not isinstance(error, Interrupted):  # all ranks stop together: one says so
        print(f"{who}: {error}", file=sys.stderr)
    return error.exit_code


def keep_traceback() -> str:
    """Write the traceback of the present exception to a file of its own; the file's path."""
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile("w", prefix="headway-error-", suffix=".txt", delete=False) as file:
        file.write(traceback.format_exc())
    return file.name
