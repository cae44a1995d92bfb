"""Every real recipe against the published size of its model, and against the model that it builds."""

from typing import NamedTuple

import pytest

from headway.pretrain import inert, recipe
from headway.pretrain.models import sizes
from headway.pretrain.models.inputs import Inputs


class Published(NamedTuple):
    """What is known of a model: rows of its token table, parameters, where it is said.

    `active` parameters are those of one token of a mixture of experts. The source leaves `uncounted` ones out.
    """

    vocab: int
    parameters: float
    source: str
    active: float = 0.0
    uncounted: int = 0


COLUMNS = 30522 * (512 - 128)  # of MobileBERT's masked head, beside the table of tokens
PUBLISHED = {
    "gpt/124m": Published(50257, 125e6, "Brown et al. 2020, table 2.1; GPT-2's release: 124M"),
    "gpt/350m": Published(50257, 356e6, "Brown et al. 2020, table D.1"),
    "gpt/1.3b": Published(50257, 1.32e9, "Brown et al. 2020, table D.1"),
    "gpt/6.7b": Published(50257, 6.66e9, "Brown et al. 2020, table D.1"),
    "gpt/13b": Published(50257, 12.85e9, "Brown et al. 2020, table D.1"),
    "gpt/175b": Published(50257, 174.6e9, "Brown et al. 2020, table D.1"),
    "bert/base": Published(30522, 110e6, "Devlin et al. 2019, section 3"),
    "bert/large": Published(30522, 336e6, "model card of bert-large-uncased (the paper rounds to 340M)"),
    "bert/mobile": Published(30522, 25.3e6, "Sun et al. 2020, table 1", uncounted=COLUMNS),
    "bert/ib_large": Published(30522, 293e6, "Sun et al. 2020, table 1", uncounted=COLUMNS),
    "t5/small": Published(32128, 60.5e6, "model card of t5-small (the paper: 60M)"),
    "t5/base": Published(32128, 223e6, "checkpoint t5-base (the paper: 220M)"),
    "t5/large": Published(32128, 738e6, "checkpoint t5-large (the paper: 770M)"),
    "t5/3b": Published(32128, 2.85e9, "checkpoint t5-3b (the paper: 2.8B)"),
    "t5/11b": Published(32128, 11.3e9, "checkpoint t5-11b (the paper: 11B)"),
    "vit/s16": Published(0, 22e6, "Touvron et al. 2021, table 1"),
    "vit/b16": Published(0, 86e6, "Dosovitskiy et al. 2021, table 1"),
    "vit/l16": Published(0, 307e6, "Dosovitskiy et al. 2021, table 1"),
    "vit/h14": Published(0, 632e6, "Dosovitskiy et al. 2021, table 1"),
    "llama/8b": Published(128256, 8.03e9, "model card of Llama 3.1"),
    "llama/70b": Published(128256, 70.6e9, "model card of Llama 3.1"),
    "llama/405b": Published(128256, 405e9, "Dubey et al. 2024, section 1"),
    "moe/switch_base": Published(32128, 7.42e9, "checkpoint switch-base-128 (the paper: 7B)"),
    "moe/mixtral_8x7b": Published(32000, 46.7e9, "release of Mixtral 8x7B: 46.7B, 12.9B active", 12.9e9),
}
DISTILL = [name for name in recipe.shipped_recipes() if name.startswith("distill/")]


def job_and_inputs(name):
    """A recipe's job, and the sizes that its paper's data would give."""
    job = recipe.resolve([name]).job
    if job.model.family == "vit":
        images = job.data.images
        return job, Inputs(length=job.row_tokens, image=images.size, channels=images.channels, classes=1000)
    target = 114 if job.model.family == "t5" else 0  # 512 tokens, 15% of them in spans of 3 (T5's code)
    return job, Inputs(vocab=PUBLISHED[name].vocab, length=job.data.seq_len, target_length=target)


def test_every_real_recipe_is_in_the_table():
    tiny = {name for name in recipe.shipped_recipes() if name.rpartition("/")[2].endswith("tiny")}
    assert set(recipe.shipped_recipes()) - tiny - set(DISTILL) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_number(name):
    job, inputs = job_and_inputs(name)
    count, published = sizes.parameters(job, inputs), PUBLISHED[name]
    assert abs((count.total - published.uncounted) / published.parameters - 1) < 0.01
    if published.active:
        assert abs(count.active / published.active - 1) < 0.01


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_model_that_is_built_has_as_many(name):
    from headway.pretrain.objectives import build_objective

    job, inputs = job_and_inputs(name)
    built = build_objective(job, inputs, device="meta")
    assert sizes.parameters(job, inputs).total == sum(p.numel() for p in built.parameters())


@pytest.mark.parametrize("name", [*PUBLISHED, *DISTILL])
def test_nothing_in_a_recipe_is_without_effect(name):
    assert inert.inert(recipe.resolve([name])) == {}


def test_the_mobilebert_is_that_of_transformers():
    """Its default configuration, head included."""
    import torch
    from transformers import MobileBertConfig, MobileBertForPreTraining

    with torch.device("meta"):
        theirs = MobileBertForPreTraining(MobileBertConfig())
    count = sizes.parameters(*job_and_inputs("bert/mobile")).total
    assert count == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("name", DISTILL)
def test_a_student_suits_the_recipe_of_its_teacher(name):
    """Models, words and rows; a teacher that is no run is not on every machine."""
    from headway.pretrain.objectives.distill.lessons import lessons

    job = recipe.resolve([name]).job
    run = job.objective.distill.teacher or ""
    if not run.startswith("runs/"):
        return
    recipes = {recipe.default_name([each]): each for each in recipe.shipped_recipes()}
    teacher = recipe.resolve([recipes[run.removeprefix("runs/")]]).job
    assert teacher.data == job.data
    assert lessons(job.objective.distill, job.model, teacher.model)


@pytest.mark.parametrize("name", DISTILL)
def test_a_student_can_do_without_its_teacher(name):
    """So are made the students that distilled ones are compared with; all that is about a teacher is then told."""
    alone = recipe.resolve([name], ["objective.distill.enabled=false"])
    inert.refuse_inert(alone)
    about = {field for field in alone.origins if field.startswith("objective.distill.")}
    assert set(inert.inert(alone)) == about - {"objective.distill.enabled"}
