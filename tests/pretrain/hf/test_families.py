"""Every family against transformers: logits, gradients, there and back, and what `from_pretrained` says."""

import json

import pytest
import torch
from torch import nn

from headway.pretrain.hf.folder import Folder, open_folder
from headway.pretrain.hf.links import Lazy
from headway.pretrain.hf.writing import inputs_of, write_folder
from headway.pretrain.objectives import build_objective

from . import models


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Name -> (transformers' model, the folder that it saved); each is made once."""
    cache = {}

    def get(name):
        if name not in cache:
            theirs = models.make(name)
            place = tmp_path_factory.mktemp("hf") / name
            theirs.save_pretrained(place)
            cache[name] = theirs, open_folder(place)
        return cache[name]

    return get


def ours_of(folder: Folder, precision: str = "fp32") -> nn.Module:
    """An objective with the weights of a folder; names must agree to the letter."""
    weights = dict(folder.tensors())
    inputs = inputs_of(folder.job, {name: tuple(t.shape) for name, t in weights.items()})
    objective = build_objective(folder.job, inputs)
    objective.load_state_dict(weights, strict=True)
    return objective.eval()


def parameters(objective: nn.Module) -> Lazy:
    named = {name: p.detach() for name, p in objective.named_parameters()}
    return Lazy(frozenset(named), named.__getitem__)


def save(objective: nn.Module, folder: Folder, place) -> Folder:
    source = parameters(objective)
    outline = Lazy(source.names, lambda name: source.read(name).to("meta"))
    write_folder(place, folder.job, source, outline, {})
    return open_folder(place)


@torch.no_grad()
def distance(a, b, floor=0.0) -> float:
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max()) / max(float(b.abs().max()), floor)


@pytest.mark.parametrize("name", models.ALL)
def test_outputs_and_gradients_agree(made, name, tmp_path):
    theirs, folder = made(name)
    assert not folder.left_over()
    ours = ours_of(folder)
    outputs = models.run(name, ours, theirs)
    for key, value in outputs.theirs.items():
        # fp32 sums of ~100 products in another order: 1e-6; the issue asks for 1e-5
        assert distance(outputs.ours[key], value) < 1e-5, key
    generator = torch.Generator().manual_seed(2)
    weights = {key: torch.randn(value.shape, generator=generator) for key, value in outputs.theirs.items()}
    sum((outputs.ours[key] * w).sum() for key, w in weights.items()).backward()
    sum((outputs.theirs[key] * w).sum() for key, w in weights.items()).backward()
    expected = gradients(theirs, tmp_path)
    assert expected.keys() == dict(ours.named_parameters()).keys()
    # keys' biases have no gradient but rounding: softmax does not see them. So a floor: a thousandth of the largest
    floor = max(float(g.abs().max()) for g in expected.values()) / 1000
    for key, gradient in expected.items():
        assert distance(ours.get_parameter(key).grad, gradient, floor) < 1e-4, key
    theirs.zero_grad()


def gradients(theirs: nn.Module, place) -> dict:
    """Gradients of transformers' model under our names: saved as if they were its weights, and read."""
    values = {p: p.detach().clone() for p in theirs.parameters() if p.requires_grad}
    with torch.no_grad():
        for p in values:
            p.copy_(p.grad if p.grad is not None else torch.zeros_like(p))
    theirs.save_pretrained(place / "gradients")
    with torch.no_grad():
        for p, value in values.items():
            p.copy_(value)
    return dict(open_folder(place / "gradients").tensors())


@pytest.mark.parametrize("name", models.ALL)
def test_import_of_export_is_bitwise_the_same(made, name, tmp_path):
    _, folder = made(name)
    ours = ours_of(folder)
    back = save(ours, folder, tmp_path / "out")
    named, again = dict(ours.named_parameters()), dict(back.tensors())
    assert named.keys() == again.keys()
    assert all(torch.equal(named[key], again[key]) for key in named)
    assert back.settings == folder.settings
    # and theirs: the files hold the same tensors under the same names
    assert back.source.names == folder.source.names
    assert all(torch.equal(back.source.read(key), folder.source.read(key)) for key in back.source.names)


@pytest.mark.parametrize("name", models.ALL)
def test_from_pretrained_finds_all_it_wants_and_computes_the_same(made, name, tmp_path):
    import transformers

    theirs, folder = made(name)
    save(ours_of(folder), folder, tmp_path)
    kind = json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    loaded, report = getattr(transformers, kind).from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert kind == type(theirs).__name__
    assert not any(report.values()), report
    assert type(auto_class(name).from_pretrained(tmp_path)).__name__ == kind
    a, b = theirs.state_dict(), loaded.state_dict()
    assert a.keys() == b.keys()
    # the fixed positions of MAE are computed by both, in fp64 here
    close = {key for key in a if "pos" in key}
    assert all(torch.allclose(a[k], b[k], atol=1e-6) if k in close else torch.equal(a[k], b[k]) for k in a)


def auto_class(name):
    import transformers

    if name in models.CAUSAL:
        return transformers.AutoModelForCausalLM
    if name in models.MASKED:
        return (
            transformers.AutoModelForPreTraining
            if not name.endswith("untied")
            else transformers.AutoModelForMaskedLM
        )
    if name in models.SEQ2SEQ:
        return transformers.AutoModelForSeq2SeqLM
    return (
        transformers.AutoModelForPreTraining
        if name == "mae"
        else transformers.AutoModelForImageClassification
    )
