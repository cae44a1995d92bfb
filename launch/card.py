"""`headway card`: a run's model card and data sheet, and the same for a folder that is exported."""

from __future__ import annotations

import math
from pathlib import Path

from headway.launch.finish import with_origins
from headway.launch.start_from import AVERAGE, is_weight
from headway.parallel.checkpoint.manifest import Manifest, read_manifest
from headway.parallel.checkpoint.retention import latest
from headway.pretrain.data.ledger import LEDGER
from headway.pretrain.data.ledger_check import check
from headway.pretrain.errors import CheckpointError, DataError, JobError, LedgerError
from headway.pretrain.recipe import load_job
from headway.pretrain.records.card.story import Story, Weights, read_story
from headway.pretrain.records.card.write import write_card
from headway.pretrain.records.metrics import read_metrics


def write(run_path: str, out: str | None) -> None:
    """Write MODEL_CARD.md, DATA_SHEET.md and loss.png of a run.

    Raises:
        JobError: no run there.
    """
    run = Path(run_path)
    if not (run / "job.yaml").exists():
        raise JobError("run", run_path, "is no run folder: it has no job.yaml", "e.g. runs/gpt-tiny")
    print(write_card(tell(run, newest(run)), Path(out) if out else run))


def write_for_export(checkpoint: Path, target: Path, average: bool) -> str | None:
    """Write the card of a checkpoint's run as README.md of a folder for the hub; what a person should know.

    Args:
        average: the folder holds the averages of the weights, which evaluations are of where there are some.
    """
    run = checkpoint.resolve().parent.parent
    if not (run / "job.yaml").exists():
        return "no README.md: the checkpoint lies in no run folder, whose records would tell of it"
    manifest = read_manifest(checkpoint)
    measured = average or not any(name.startswith(AVERAGE) for name in manifest.tensors)
    write_card(tell(run, manifest, measured), target, "README.md", library="transformers")
    return None


def tell(run: Path, manifest: Manifest | None, measured: bool = True) -> Story:
    """All that a run's records tell, as of a checkpoint."""
    proof, used = prove(run)
    return read_story(run, with_origins(load_job(run / "job.yaml")), weigh(manifest, measured), proof, used)


def newest(run: Path) -> Manifest | None:
    """The manifest of the newest checkpoint; None if there is none that can be read."""
    path = latest(run / "checkpoints")
    try:
        return read_manifest(path) if path else None
    except CheckpointError:  # `headway checkpoint verify` is about that
        return None


def weigh(manifest: Manifest | None, measured: bool) -> Weights | None:
    """The weights that a manifest lists."""
    if manifest is None:
        return None
    entries = [entry for name, entry in manifest.tensors.items() if is_weight(name)]
    imported = manifest.numbers.get("imported")
    return Weights(
        step=manifest.step,
        parameters=sum(math.prod(entry.shape) for entry in entries),
        dtypes=sorted({entry.dtype for entry in entries}),
        created=manifest.created,
        imported=Path(imported).name if imported else None,
        measured=measured,
    )


def prove(run: Path) -> tuple[str, list[tuple[str, int, int]]]:
    """What the ledger shows of the samples, in a sentence, and (source, samples, used); nothing of the data is
    opened."""
    if not (run / LEDGER).exists():
        return "The run kept no ledger: which samples it used is not recorded.", []
    try:
        proof = check(read_metrics(run / LEDGER))
    except (LedgerError, DataError) as error:
        return f"The ledger does not show that every sample was used exactly once an epoch: {error}", []
    used = [(source.name, source.size, source.used) for source in proof.sources.values()]
    words = f"The ledger of {len(proof.ends):,} steps proves it: every sample was used exactly once an epoch"
    return f"{words}, none lost, none repeated (`headway data ledger`).", used
