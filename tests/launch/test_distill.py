"""A whole run with a teacher, as a user starts it."""

import signal
import subprocess

import pytest
import torch

from headway.launch import run
from headway.pretrain.errors import JobError
from headway.pretrain.records.metrics import read_metrics
from headway.pretrain.records.records import read_events
from headway.tests.launch.test_train import command, losses, wait_for_step, weights

DISTILL = "objective.distill"
TOLD = ("step", "loss", "grad_norm", "soft_loss", "contrast", "learned/attention", "learned/states")
"""What a step has of numbers that do not depend on time."""


@pytest.fixture(scope="module")
def start(small_job, tmp_path_factory):
    """Train the small job, in a folder of the module's own; returns the run's folder."""
    folder = tmp_path_factory.mktemp("runs")

    def train(name: str, *sets: str):
        run.train([str(small_job)], [f"run.dir={folder}", f"run.name={name}", *sets])
        return folder / name

    return train


@pytest.fixture(scope="module")
def teacher(start):
    return start("teacher")


def evaluations(folder):
    return [event for event in read_events(folder) if event.get("kind") == "eval"]


def test_a_run_with_a_teacher_is_evaluated_as_one_without(start, teacher):
    """On the same held-out rows: the objective's own loss, and beside it how far the student is from the teacher."""
    own = "model.layers=1", "train.steps=10", "train.eval_every=5"
    terms = "logits", "attention", "relations", "states", "final"
    weights = [f"{DISTILL}.{term}.weight=1.0" for term in terms]
    alone = evaluations(start("alone", *own))
    taught = evaluations(start("taught", *own, f"{DISTILL}.teacher={teacher}", *weights))
    assert (
        taught[0]["heldout_loss"] == alone[0]["heldout_loss"]
    )  # before the first step they are the same model
    assert taught[-1]["heldout_loss"] != alone[-1]["heldout_loss"]
    assert "heldout_learned/relations" in taught[-1]  # so small a teacher relates all places alike
    for name in ("soft_loss", "learned/attention", "learned/states", "learned/final"):
        assert taught[-1][f"heldout_{name}"] < taught[0][f"heldout_{name}"]


def test_a_run_in_stages_goes_on_as_if_it_had_not_stopped(start, teacher):
    """Maps and states through a projection first, then soft targets and a queue of representations; stopped in each
    stage and at the border. Losses have the same bits, and so have weights, moments and the queue."""
    stages = [
        f"{DISTILL}.teacher={teacher}",
        "model.hidden=16",
        f"{DISTILL}.attention={{weight: 1.0, end: 5}}",
        f"{DISTILL}.states={{weight: 1.0, end: 5}}",
        f"{DISTILL}.logits={{weight: 1.0, begin: 5}}",
        f"{DISTILL}.contrast={{weight: 0.1, begin: 5, queue: 12}}",
        "checkpoint.every=0",
    ]
    through = start("through", *stages, "train.steps=10")
    for steps in (3, 5, 8, 10):
        stopped = start("stopped", *stages, f"train.steps={steps}")
    for rows in zip(read_metrics(through), read_metrics(stopped), strict=True):
        first, second = ({k: v for k, v in row.items() if k in TOLD} for row in rows)
        assert first == second
    one, other = (weights(folder, 10) for folder in (through, stopped))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "distillation.contrast.queue" in one


@pytest.mark.matrix
def test_a_teacher_on_a_rank_of_its_own(start, teacher, small_job):
    """A signal ends both sides, saved; one process goes on where two were, and the curve is that of one from the
    beginning."""
    sets = [
        f"{DISTILL}.teacher={teacher}",
        f"{DISTILL}.attention.weight=1.0",
        f"{DISTILL}.logits.weight=1.0",
        "precision=fp64",
        "checkpoint.every=0",
    ]
    folder = teacher.parent
    asked = [*sets, "train.steps=100000", "parallel.teacher.ranks=1"]
    words = [*command(small_job, folder, "--nproc", "2"), *(w for one in asked for w in ("--set", one))]
    words[words.index("run.name=run")] = "run.name=apart"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, **pipes) as child:
        wait_for_step(child, 1)
        child.send_signal(signal.SIGTERM)
        _, errors = child.communicate(timeout=120)
    assert child.returncode == 75, errors
    assert "saved after step" in errors
    assert "Traceback" not in errors
    steps = len(read_metrics(folder / "apart")) + 3
    goes_on = start("apart", *sets, f"train.steps={steps}", "schedule.steps=100000")
    whole = start("beside", *sets, f"train.steps={steps}", "schedule.steps=100000")
    assert losses(goes_on) == pytest.approx(losses(whole), rel=1e-9)


def test_images_of_a_teacher_have_the_same_places(start, tmp_path):
    """Or nothing is learned place by place."""
    recipe = tmp_path / "digits.yaml"
    recipe.write_text(DIGITS)
    sets = [f"run.dir={tmp_path}", "run.name=teacher"]
    run.train([str(recipe)], sets)
    student = [
        f"run.dir={tmp_path}",
        f"{DISTILL}.teacher={tmp_path}/teacher",
        "model.vision.distill_token=true",
    ]
    with pytest.raises(JobError, match=r"model.vision.distill_token = True: .*attention.*Nearest.*False"):
        run.train([str(recipe)], [*student, f"{DISTILL}.attention.weight=1.0"])
    run.train([str(recipe)], [*student, f"{DISTILL}.logits.weight=1.0"])


DIGITS = """\
model: {family: vit, layers: 1, hidden: 16, heads: 2, vision: {patch: 4}}
data: {sources: ["sklearn:digits"], heldout: 0.2, images: {size: 8, channels: 1}}
objective: {name: classify}
train: {steps: 2, global_batch: 8, compile: false}
precision: fp32
tracking: {wandb: off}
"""
