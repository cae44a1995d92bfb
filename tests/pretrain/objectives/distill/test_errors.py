"""Pairs that do not fit: each is refused before anything is built, and names field, value, rule and a legal choice."""

from types import SimpleNamespace

import pytest
import torch

from headway.launch.teacher import find_teacher, shape_of
from headway.pretrain.config import Job, Model
from headway.pretrain.config.distill import Distill
from headway.pretrain.errors import JobError
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.objectives import build_objective
from headway.pretrain.objectives.distill.lessons import lessons

from .twins import CLASSES, LENGTH, VOCAB, make

GPT = {"layers": 2, "hidden": 24, "heads": 3}
T5 = GPT | {"family": "t5", "positions": "relative"}
DECODER = {"layers": 1, "decoder_layers": 2}
MAPS = {"attention": {"weight": 1.0}}


def check(distill, student, teacher):
    settings = Distill.model_validate({"teacher": "runs/large"} | distill)
    return lessons(settings, Model.model_validate(GPT | student), Model.model_validate(GPT | teacher))


def attention(*pattern, **numbers):
    return {"attention": {"pattern": pattern, **numbers}}


REFUSED = {
    "family": (
        MAPS, {}, {"family": "bert"},
        r"objective\.distill\.teacher = 'runs/large': the student is a gpt, the teacher a bert.*one family.*a gpt",
    ),
    "layers": (
        MAPS, {}, {"layers": 3},
        r"objective\.distill\.layers = 'uniform': 2 layers cannot be spread evenly over the teacher's 3.*\[0, 2\]",
    ),
    "layers of a part": (
        {"states": {"weight": 1.0, "layers": [0, 5]}}, {}, {"layers": 4},
        r"objective\.distill\.states\.layers = \[0, 5\]: the teacher has layers 0 to 3, and none 5.*\[0, 3\]",
    ),
    "layers of a decoder": (
        MAPS | {"layers": [0, 1]}, T5 | {"decoder_layers": 3}, T5,
        r"objective\.distill\.layers = \[0, 1\]: names a layer.*student's 3 layers",
    ),
    "heads": (
        MAPS, {}, {"heads": 4},
        r"objective\.distill\.attention\.heads = 'average': the teacher's 4 heads are no multiple of the student's 3"
        r".*\[0, 1, 2\]",
    ),
    "fewer heads": (
        MAPS, {"heads": 4}, {"heads": 2}, r"attention\.heads = 'average': .*2 heads.*student's 4.*\[0, 0, 1, 1\]",
    ),
    "heads of rows": ({"rows": {"weight": 1.0}}, {}, {"heads": 4}, r"attention\.heads = 'average'"),
    "heads that are too few": (
        {"attention": {"weight": 1.0, "heads": [0, 1]}}, {}, {"heads": 6},
        r"attention\.heads = \[0, 1\]: names one of the teacher's 6 heads for each of the student's 3.*\[0, 2, 4\]",
    ),
    "heads that are not there": (
        {"attention": {"weight": 1.0, "heads": [0, 1, 6]}}, {}, {"heads": 6}, r"attention\.heads = \[0, 1, 6\]",
    ),
    "relation heads of the student": (
        {"relations": {"weight": 1.0, "heads": 5}}, {}, {"hidden": 40, "heads": 4},
        r"objective\.distill\.relations\.heads = 5: must divide the 24 features of the student's values.*4",
    ),
    "relation heads of the teacher": (
        {"relations": {"weight": 1.0, "heads": 3, "of": ["queries"]}}, {}, {"hidden": 40, "heads": 4},
        r"relations\.heads = 3: must divide the 40 features of the teacher's queries.*2",
    ),
    "relation heads of few keys": (
        {"relations": {"weight": 1.0, "heads": 6, "of": ["queries", "keys"]}}, {"hidden": 12, "kv_heads": 1}, {},
        r"relations\.heads = 6: must divide the 4 features of the student's keys.*4",
    ),
    "blocks that share weights": (
        MAPS, {"unique_layers": 1}, {},
        r"model\.unique_layers = 1: objective\.distill\.attention is learned layer by layer: .*weights of their own.*2",
    ),
    "maps that are no softmax": (
        MAPS, attention("dense", "linear"), {},
        r"model\.attention \(student, layer 1\) = 'linear': .*softmax.*relations suits any.*dense",
    ),
    "a teacher's maps that are no softmax": (
        {"rows": {"weight": 1.0}}, {}, attention("performer"),
        r"model\.attention \(teacher, layer 1\) = 'performer': .*over all keys that the student sees.*dense",
    ),
    "a teacher that sees less": (
        MAPS, {}, attention("window"), r"model\.attention \(teacher, layer 0\) = 'window': .*all keys",
    ),
    "a teacher's window that is another": (
        MAPS, attention("window", window=8), attention("window", window=4),
        r"model\.attention \(teacher, layer 0\) = 'window'",
    ),
    "a decoder's maps": (
        MAPS, T5 | DECODER | attention("dense", "linear"), T5 | DECODER,
        r"model\.attention \(student, layer 1\) = 'linear'",
    ),
    "relations without heads": (
        {"relations": {"weight": 1.0}}, attention("dense", "hyena"), {},
        r"model\.attention \(student, layer 1\) = 'hyena': has no queries, keys and values by heads.*dense",
    ),
    "a teacher's relations without heads": (
        {"relations": {"weight": 1.0}}, {}, attention("dense", "hyena"),
        r"model\.attention \(teacher, layer 1\) = 'hyena': has no queries",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_pair_that_does_not_fit_is_refused(case):
    distill, student, teacher, said = REFUSED[case]
    with pytest.raises(JobError, match=said):
        check(distill, student, teacher)


LEGAL = {
    "other widths, heads by list": ({"attention": {"weight": 1.0, "heads": [0, 1, 3]}}, {}, {"hidden": 40, "heads": 4}),
    "layers that are not compared": (
        {"attention": {"weight": 1.0, "layers": [None, 1]}}, attention("linear", "dense"), attention("hyena", "dense"),
    ),
    "a student that sees less": (MAPS, attention("window"), {}),
    "windows alike": (MAPS, attention("window", window=4), {"layers": 4} | attention("window", window=4)),
    "relations of linear attention": ({"relations": {"weight": 1.0}}, attention("linear"), attention("performer")),
    "states of anything": ({"states": {"weight": 1.0}}, attention("hyena"), {"hidden": 40, "heads": 4}),
    "a teacher whose blocks share weights": (MAPS, {}, {"layers": 4, "unique_layers": 1}),
    "the last states of blocks that share weights": ({"final": {"weight": 1.0}}, {"unique_layers": 1}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", LEGAL)
def test_a_pair_that_fits_is_not_refused(case):
    assert check(*LEGAL[case])


# -- what a teacher knows --------------------------------------------------------------------------------------


def found(place, kind, job=None, pieces=VOCAB, **shape):
    """A teacher of a folder of transformers, checked against a student's job and data."""
    make(kind, **shape).save_pretrained(place)
    family = {"gpt2": "gpt", "bert": "bert", "vit": "vit"}[kind]
    name = {"gpt": "causal", "bert": "masked", "vit": "classify"}[family]
    tree = {
        "model": {"family": family, "layers": 2, "hidden": 24, "heads": 3, "vision": {"patch": 4}},
        "data": {"seq_len": LENGTH, "images": {"size": 12}},
        "objective": {"name": name, "distill": {"teacher": str(place), "logits": {"weight": 1.0}}},
    }
    for section, more in (job or {}).items():
        tree[section] = tree[section] | more
    job = Job.model_validate(tree)
    inputs = Inputs(pieces, job.row_tokens, 0, 12, 3, CLASSES)
    tokenizer = SimpleNamespace(pieces=lambda: [str(i) for i in range(pieces)])
    return find_teacher(job, SimpleNamespace(inputs=inputs, tokenizer=tokenizer)), job, inputs


@pytest.mark.parametrize("kind", ["gpt2", "bert", "vit"])
def test_a_teacher_that_fits_is_found(kind, tmp_path):
    source, job, inputs = found(tmp_path, kind)
    shape = shape_of(source)
    assert (shape.vocab, shape.head_width, shape.head_bias, shape.classes) == {
        "gpt2": (VOCAB, 24, False, 0), "bert": (VOCAB, 24, True, 0), "vit": (0, 0, False, CLASSES),
    }[kind]  # fmt: skip
    with torch.device("meta"):
        assert build_objective(job, inputs, device="meta", teacher=shape).distillation is not None


def test_a_place_without_a_model_is_no_teacher(tmp_path):
    distill = {"teacher": str(tmp_path / "nothing"), "logits": {"weight": 1.0}}
    with pytest.raises(
        JobError, match=r"objective\.distill\.teacher = '.*nothing': no teacher is there.*a run"
    ):
        find_teacher(Job.model_validate({"objective": {"distill": distill}}), SimpleNamespace())


UNFIT = {
    "rows beyond the teacher's positions": (
        "bert", {"data": {"seq_len": LENGTH + 4}}, {}, {},
        rf"data\.seq_len = {LENGTH + 4}: the teacher .* has {LENGTH} positions.*{LENGTH}",
    ),
    "words that the teacher does not know": (
        "gpt2", {}, {"pieces": VOCAB + 3}, {},
        rf"data\.tokenizer = .*knows {VOCAB} words, the student's data has {VOCAB + 3}",
    ),
    "other patches": (
        "vit",
        {"model": {"family": "vit", "layers": 2, "hidden": 24, "heads": 3, "vision": {"patch": 6}},
         "objective": {"name": "classify", "distill": MAPS}},
        {}, {}, r"model\.vision\.patch = 6: places are compared one by one \(attention\).*4",
    ),
    "other images": (
        "vit", {"data": {"images": {"size": 16}}}, {}, {},
        r"data\.images\.size = 16: .*reads images of another kind.*12",
    ),
    "other classes": (
        "vit", {}, {}, {"num_labels": CLASSES + 1},
        rf"data\.images = {CLASSES}: the teacher .* knows {CLASSES + 1} classes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_a_teacher_of_other_data_is_refused(case, tmp_path):
    kind, job, more, shape, said = UNFIT[case]
    if "objective" in job:
        distill = job["objective"]["distill"] | {"teacher": str(tmp_path)}
        job = job | {"objective": job["objective"] | {"distill": distill}}
    with pytest.raises(JobError, match=said):
        found(tmp_path, kind, job, **more, **shape)


def test_a_teacher_without_a_head_has_no_soft_targets(tmp_path):
    make("bert").bert.save_pretrained(tmp_path)
    job = {
        "model": {"family": "bert"},
        "objective": {"name": "masked", "distill": {"teacher": str(tmp_path), "logits": {"weight": 0.5}}},
    }
    with pytest.raises(
        JobError, match=r"objective\.distill\.logits\.weight = 0\.5: .*teacher with a head.*has none.*0"
    ):
        find_teacher(Job.model_validate(job), SimpleNamespace())
