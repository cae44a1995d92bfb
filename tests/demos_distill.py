"""The table of `make demos-distill`: every student beside the same student without a teacher; fails where one is no
better.

A pair of runs is compared if they differ in nothing but the teacher: same model, data, order, steps and schedule.
"""

import json
import sys
from pathlib import Path
from typing import Literal, NamedTuple

from rich.console import Console
from rich.table import Table

from headway.launch.resume import differences
from headway.pretrain.recipe import load_job
from headway.pretrain.records.records import read_events
from headway.tests.sentences import agreement

RUNS = Path("runs")


class Pair(NamedTuple):
    """A student and what it is compared with.

    Attributes:
        student: name of its run.
        alone: of the run of the same student without a teacher.
        teacher: of the teacher's run.
        measure: what is compared, of held-out data.
    """

    student: str
    alone: str
    teacher: str
    measure: Literal["loss", "accuracy"] = "loss"


BERT, GPT, VIT = "distill-bert_teacher", "distill-gpt_teacher", "distill-vit_teacher"
PAIRS = (
    Pair("distill-tinybert", "distill-tinybert-alone", BERT),
    Pair("distill-minilmv2", "distill-tinybert-alone", BERT),
    Pair("distill-distilbert", "distill-distilbert-alone", BERT),
    Pair("distill-mobilebert", "distill-mobilebert-alone", BERT),
    Pair("distill-gpt_half", "distill-gpt_half-alone", GPT),
    Pair("distill-vit", "distill-vit-alone", VIT, "accuracy"),
)
MINILM = "distill-minilm_tiny"
SHRINKS = 0.5
"""Of MiniLM's attention KL as it began, what may be left at most."""


def main() -> int:
    table = Table("student", "held-out", "reaches", "without teacher", "teacher", "steps", "time")
    failures: list[str] = []
    for pair in PAIRS:
        failures += compared(table, pair)
    failures += minilm(table)
    Console().print(table)
    print("sentences: correlation of cosines of pairs of held-out sentences with the teacher's")
    print(*failures, sep="\n", file=sys.stderr)
    return int(bool(failures))


def compared(table: Table, pair: Pair) -> list[str]:
    """What each reached; what is wrong with it."""
    measure = pair.measure
    ours, other, theirs = (summary(run)[f"heldout_{measure}"] for run in pair[:3])
    row(table, pair.student, measure, f"{ours:.4f}", f"{other:.4f}", f"{theirs:.4f}")
    failures = unlike(pair.student, pair.alone)
    if not (ours < other if measure == "loss" else ours > other):
        failures.append(
            f"{pair.student}: {measure} {ours:.4f} is no better than {other:.4f} without a teacher"
        )
    return failures


def minilm(table: Table) -> list[str]:
    """The student of the real MiniLM: how near it came, and how it orders sentences."""
    alone = f"{MINILM}-alone"
    failures = unlike(MINILM, alone)
    began, ended = evaluations(MINILM, "heldout_learned/attention")
    row(table, MINILM, "attention KL", f"{began:.4f} to {ended:.4f}", "", "0")
    if ended >= SHRINKS * began:
        failures.append(f"{MINILM}: attention KL {ended:.4f} is not below {SHRINKS} of {began:.4f}")
    ours, other = (agreement(str(RUNS / run), str(RUNS / MINILM)) for run in (MINILM, alone))
    for measure in ("spearman", "pearson"):
        what = f"{measure}, sentences"
        a, b = getattr(ours, measure), getattr(other, measure)
        row(table, MINILM, what, f"{a:.4f}", f"{b:.4f}", "1")
        if a <= b:
            failures.append(f"{MINILM}: {what}: {a:.4f} is no better than {b:.4f} without a teacher")
    return failures


def unlike(student: str, alone: str) -> list[str]:
    """Settings in which two runs differ beside the teacher, a line each."""
    jobs = (load_job(RUNS / run / "job.yaml").job for run in (alone, student))
    return [
        f"{student}: {name} is {value!r}, {other!r} without a teacher"
        for name, other, value in differences(*jobs)
        if not name.startswith(("objective.distill.", "run.", "tracking."))
    ]


def row(table: Table, run: str, *cells: str) -> None:
    found = summary(run)
    table.add_row(run.removeprefix("distill-"), *cells, str(found["steps"]), f"{found['seconds']:.0f} s")


def summary(run: str) -> dict:
    found: dict = json.loads((RUNS / run / "summary.json").read_text())
    return found


def evaluations(run: str, name: str) -> tuple[float, float]:
    """A held-out value before the first step and after the last."""
    found = [event[name] for event in read_events(RUNS / run) if event.get("kind") == "eval"]
    return found[0], found[-1]


if __name__ == "__main__":
    sys.exit(main())
