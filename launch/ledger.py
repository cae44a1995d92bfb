"""`headway data ledger`: the proof that a run used every sample exactly once an epoch."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from headway.launch.assemble import Parts
from headway.launch.console import console
from headway.parallel.checkpoint.manifest import read_manifest
from headway.parallel.checkpoint.retention import list_checkpoints
from headway.pretrain.data.dataset import open_dataset
from headway.pretrain.data.ledger import LEDGER, Ledger, order_of
from headway.pretrain.data.ledger_check import Counted, Proof, check
from headway.pretrain.errors import CheckpointError, JobError, LedgerError
from headway.pretrain.recipe import load_job
from headway.pretrain.records.metrics import read_metrics
from headway.pretrain.records.records import Recorder


def open_ledger(parts: Parts, folder: Path, recorder: Recorder, done: int) -> Ledger | None:
    """The ledger of a run that goes on after step `done`, on the rank that writes records."""
    if not parts.world.main:
        return None
    order = order_of(parts.loader.stream, parts.job.train)
    return Ledger(folder, done, order, lambda text: recorder.event("warning", message=text))


def show(run_path: str, *, open_data: bool) -> None:
    """Print what a run used of each source.

    Args:
        open_data: compare the recorded sizes of sources with the data itself.

    Raises:
        JobError: no run there.
        LedgerError: a sample was lost or repeated, or the records do not show that none was.
    """
    folder = Path(run_path)
    if not (folder / "job.yaml").exists():
        raise JobError("run", run_path, "is no run folder: it has no job.yaml", "e.g. runs/gpt-tiny")
    if not (folder / LEDGER).exists():
        raise LedgerError(f"{folder} has no {LEDGER}: nothing was trained, or by a release that kept none")
    proof = check(read_metrics(folder / LEDGER), sources_today(folder) if open_data else None)
    compare_with_records(folder, proof)
    steps, starts = len(proof.ends), ", ".join(map(str, proof.starts))
    console().print(table(proof))
    print(
        f"{steps} steps used {proof.ends[-1] if steps else 0:,} samples, begun or gone on with at step {starts}"
    )
    print("every sample was used exactly once an epoch: none is lost, none repeated")


def sources_today(folder: Path) -> dict[str, Counted]:
    """Sources of a run's job as its data is now, by name."""
    dataset = open_dataset(load_job(folder / "job.yaml").job, progress=False)
    return {name: Counted(len(samples), samples.identity) for name, samples, _ in dataset.train}


def compare_with_records(folder: Path, proof: Proof) -> None:
    """The ledger reaches as far as the metrics, and checkpoints go on where it says; raises LedgerError."""
    steps, recorded = len(proof.ends), read_metrics(folder)
    if recorded and recorded[-1]["step"] > steps:
        raise LedgerError(f"step {steps + 1} has no record in {LEDGER}, which ends before metrics.jsonl does")
    for path in list_checkpoints(folder / "checkpoints"):
        try:
            numbers = read_manifest(path).numbers
        except CheckpointError:  # `headway checkpoint verify` is about that
            continue
        step, cursor = numbers.get("step", 0), numbers.get("data", {}).get("draw")
        if cursor is None:
            continue
        if step > steps:
            raise LedgerError(f"step {steps + 1} has no record in {LEDGER}, but {path.name} was saved")
        if cursor != (used := proof.ends[step - 1] if step else 0):
            rule = f"goes on at draw {cursor}, but {used} draws were used by then"
            raise LedgerError(f"step {step}: {path.name} {rule}")


def table(proof: Proof) -> Table:
    """Uses of each source."""
    found = Table(box=None, header_style="bold")
    found.add_column("source", no_wrap=True)
    for title in ("samples", "used", "whole epochs", "in the last one"):
        found.add_column(title, justify="right", no_wrap=True)
    for source in proof.sources.values():
        epochs, rest = divmod(source.used, source.size)
        found.add_row(
            source.name,
            f"{source.size:,}",
            f"{source.used:,}",
            str(epochs),
            f"{rest:,} ({rest / source.size:.1%})",
        )
    return found
