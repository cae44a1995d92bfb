"""Mixers of images and graphs, whole, against timm's, transformers' and torch-geometric's with the same weights."""

import pytest
import torch

from headway.kernels.attention.masks import Mask
from headway.kernels.attention.registry import mechanism
from headway.pretrain import config
from headway.pretrain.config import Job
from headway.pretrain.errors import JobError
from headway.pretrain.models.attention import attention_shape
from headway.pretrain.models.cost import total
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.layers import Noise
from headway.pretrain.models.mixers import build_mixer
from headway.pretrain.models.schemes import rule
from headway.pretrain.models.seat import Seat
from headway.pretrain.objectives import build_objective
from headway.tests import oracles

WORDS = ["se", "cbam", "nonlocal", "cvt", "deformable", "gat", "gatv2"]
SIDE, WIDTH = 6, 16
ROUNDINGS = {"rtol": 1e-11, "atol": 1e-11}
"""fp64: two or three products of up to 40 terms of order 1, in another order."""


def mixer(word, first=1, family="vit", causal=False, tokens=None, **attention):
    """A layer in fp64 with parameters of deviation 1/2, and what it was built from; `first` tokens before patches."""
    model = config.Model(
        family=family, hidden=WIDTH, heads=4, vision={"class_token": first > 0, "distill_token": first > 1},
        attention={"mechanism": word, **({"reduction": 4} if word in ("se", "cbam") else {}), **attention},
    )  # fmt: skip
    seat = Seat(0, causal, tokens=tokens or SIDE**2 + first)
    made = build_mixer(model, seat).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / 2)
    return made, model, seat


def tokens(count, rows=2):
    return torch.randn(rows, count, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def copy(theirs, **pairs):
    """Give their modules our tensors, which stay part of the graph."""
    for path, tensor in pairs.items():
        *parents, name = path.split("__")
        module = theirs
        for parent in parents:
            module = getattr(module, parent)
        old = getattr(module, name)
        assert old.numel() == tensor.numel(), path
        delattr(module, name)
        setattr(module, name, tensor.view(old.shape))


def agree(ours, theirs, x, made):
    torch.testing.assert_close(ours, theirs, **ROUNDINGS)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3), dtype=ours.dtype)
    inputs = [x, *made.parameters()]
    gradients = [torch.autograd.grad(y, inputs, upstream, retain_graph=True) for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)  # sums of 70 rows of the above


@pytest.mark.parametrize("word", ["se", "cbam", "nonlocal"])
def test_gates_and_non_local_blocks_are_timms(word):
    oracles.timm()
    from timm.layers import NonLocalAttn, SEModule
    from timm.layers.cbam import CbamModule

    made, *_ = mixer(word, first=0, scale=0.25 if word == "nonlocal" else None)
    x = tokens(SIDE**2).requires_grad_()
    image = x.transpose(1, 2).unflatten(2, (SIDE, SIDE))
    if word == "nonlocal":
        theirs = NonLocalAttn(WIDTH, rd_channels=8).double()  # its factor is 16 ** -0.5
        theirs.norm = torch.nn.Identity()
        ours = {"t": made.theta, "p": made.phi, "g": made.g, "z": made.o}
        copy(theirs, **{f"{a}__{n}": getattr(m, n) for a, m in ours.items() for n in ("weight", "bias")})
        y = theirs(image) - image
    elif word == "se":
        theirs = SEModule(WIDTH, rd_channels=4).double()
        ours = {"fc1": made.reduce, "fc2": made.expand}
        copy(theirs, **{f"{a}__{n}": getattr(m, n) for a, m in ours.items() for n in ("weight", "bias")})
        y = theirs(image)
    else:
        theirs = CbamModule(WIDTH, rd_channels=4).double()
        theirs.spatial.conv.bn = torch.nn.Identity()
        theirs.spatial.conv.conv.bias = made.spatial.bias
        copy(
            theirs,
            channel__fc1__weight=made.reduce.weight,
            channel__fc2__weight=made.expand.weight,
            spatial__conv__conv__weight=made.spatial.weight,
        )
        y = theirs(image)
    agree(made(x, Mask(False))[0], y.flatten(2).transpose(1, 2), x, made)


@pytest.mark.parametrize("class_token", [False, True])
def test_cvt_is_transformers(class_token):
    from transformers.models.cvt.modeling_cvt import CvtAttention

    made, *_ = mixer("cvt", class_token, scale=WIDTH**-0.5)
    theirs = CvtAttention(4, WIDTH, 3, 1, 1, 1, 2, "dw_bn", True, 0.0, 0.0, class_token).double()
    own = theirs.attention
    for ours, name in (("q", "query"), ("k", "key"), ("v", "value")):
        conv = getattr(own, f"convolution_projection_{name}").convolution_projection
        conv.normalization = torch.nn.Identity()
        copy(conv, convolution__weight=getattr(made, f"{ours}_conv"))
        projection = getattr(made, ours)
        copy(getattr(own, f"projection_{name}"), weight=projection.weight, bias=projection.bias)
    copy(theirs.output.dense, weight=made.o.weight, bias=made.o.bias)
    x = tokens(SIDE**2 + class_token).requires_grad_()
    agree(made(x, Mask(False))[0], theirs(x, SIDE, SIDE), x, made)


@pytest.mark.parametrize("kernel", ["reference", "sampled"])
def test_deformable_is_transformers(kernel):
    """Theirs is given means of 2 x 2 patches as its second level, and a query in the middle for the class token."""
    from transformers import DeformableDetrConfig
    from transformers.models.deformable_detr.modeling_deformable_detr import (
        DeformableDetrMultiscaleDeformableAttention,
    )

    from headway.kernels.attention.grids.deformable import ring

    made, *_ = mixer("deformable", depth=2, points=3, kernel=kernel)
    settings = DeformableDetrConfig(d_model=WIDTH, num_feature_levels=2, disable_custom_kernels=True)
    theirs = DeformableDetrMultiscaleDeformableAttention(settings, 4, 3).double()
    start = ring(4, 3, torch.device("cpu"), torch.float64)[:, None].expand(4, 2, 3, 2)
    copy(
        theirs,
        sampling_offsets__weight=made.offsets.weight,
        sampling_offsets__bias=made.offsets.bias + start.flatten(),
        attention_weights__weight=made.amounts.weight,
        attention_weights__bias=made.amounts.bias,
        value_proj__weight=made.v.weight,
        value_proj__bias=made.v.bias,
        output_proj__weight=made.o.weight,
        output_proj__bias=made.o.bias,
    )
    x = tokens(SIDE**2 + 1).requires_grad_()
    image = x[:, 1:].transpose(1, 2).unflatten(2, (SIDE, SIDE))
    small = torch.nn.functional.avg_pool2d(image, 2)
    memory = torch.cat([m.flatten(2).transpose(1, 2) for m in (image, small)], 1)
    sides = [(SIDE, SIDE), (SIDE // 2, SIDE // 2)]
    middles = (torch.arange(SIDE, dtype=torch.float64) + 0.5) / SIDE
    stand = torch.stack(torch.meshgrid(middles, middles, indexing="xy"), -1).flatten(0, 1)
    stand = torch.cat((torch.full((1, 2), 0.5, dtype=torch.float64), stand))[None, :, None].expand(
        2, -1, 2, 2
    )
    y, _ = theirs(
        x,
        encoder_hidden_states=memory,
        reference_points=stand,
        spatial_shapes=torch.tensor(sides),
        spatial_shapes_list=sides,
    )
    agree(made(x, Mask(False))[0], y, x, made)


@pytest.mark.parametrize("kernel", ["reference", "edges"])
@pytest.mark.parametrize("word", ["gat", "gatv2"])
def test_graph_attention_of_documents_is_torch_geometrics(word, kernel):
    oracles.package_folder("torch_geometric")
    from torch_geometric.nn import GATConv, GATv2Conv

    made, *_ = mixer(word, family="gpt", causal=True, neighbours=3, tokens=11, kernel=kernel)
    x = tokens(11).requires_grad_()
    documents = torch.tensor([[0] * 5 + [1] * 4 + [-1] * 2, [0] * 11])
    edges = [
        [(j, i) for i in range(11) for j in range(max(0, i - 3), i + 1) if row[i] == row[j]]
        for row in documents
    ]
    theirs = (GATConv if word == "gat" else GATv2Conv)(WIDTH, 4, 4, add_self_loops=False).double()
    if word == "gat":
        copy(theirs, lin__weight=made.v.weight, att_src=made.source, att_dst=made.target)
        theirs.lin.bias = made.v.bias  # theirs has one at the end alone
    else:
        copy(theirs, lin_l__weight=made.v.weight, lin_l__bias=made.v.bias, att=made.score)
        copy(theirs, lin_r__weight=made.q.weight, lin_r__bias=made.q.bias)
    with torch.no_grad():
        theirs.bias.zero_()
    rows = [theirs(x[b], torch.tensor(edges[b]).T) for b in range(2)]
    agree(made(x, Mask(True, documents))[0], made.o(torch.stack(rows)), x, made)


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("word", WORDS)
def test_fewer_queries_are_the_first_of_all(word, first):
    made, *_ = mixer(word, first)
    x = tokens(SIDE**2 + first)
    whole = made(x, Mask(False))[0]
    for queries in (1, 2, 5):
        torch.testing.assert_close(made(x, Mask(False), queries=queries)[0], whole[:, :queries], **ROUNDINGS)


@pytest.mark.parametrize(("first", "asking"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("word", WORDS)
def test_tokens_before_the_patches_hear_of_every_patch(word, first, asking):
    """At the start deformable attention reads its neighbourhood alone; gates hear of patches, and of oneself."""
    made, *_ = mixer(word, first)
    x = tokens(SIDE**2 + first).requires_grad_()
    made(x, Mask(False))[0][:, asking].square().sum().backward()
    heard = (x.grad != 0).any(-1).any(0)
    assert heard[asking]
    assert heard[first:].sum() > 3 if word == "deformable" else heard[first:].all()
    if first == 2 and word in ("nonlocal", "cvt", "gat", "gatv2"):
        assert heard[1 - asking]  # attention among places lets the two hear each other


@pytest.mark.parametrize("word", ["se", "cbam", "deformable"])
def test_patches_do_not_hear_of_tokens_that_are_no_part_of_the_grid(word):
    """So patches are what they are without such tokens, whose number changes nothing."""
    patches, whole = tokens(SIDE**2), []
    for first in (0, 1, 2):
        made, *_ = mixer(word, first)
        x = torch.cat((tokens(first), patches), 1)
        whole.append(made(x, Mask(False))[0][:, first:])
    torch.testing.assert_close(whole[1], whole[0], **ROUNDINGS)
    torch.testing.assert_close(whole[2], whole[0], **ROUNDINGS)


@pytest.mark.parametrize("first", [1, 2])
def test_images_of_neighbours_are_graphs(first):
    """A patch in the middle reads those at most so far away, and the tokens before them; these alone read all."""
    made, *_ = mixer("gat", first, neighbours=1)
    x = tokens(SIDE**2 + first).requires_grad_()
    place = first + 2 * SIDE + 3
    made(x, Mask(False))[0][:, place].sum().backward()
    heard = (x.grad[0] != 0).any(-1)
    assert heard[:first].all()
    assert heard[first:].view(SIDE, SIDE).nonzero().tolist() == [[r, c] for r in (1, 2, 3) for c in (2, 3, 4)]


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("word", WORDS)
def test_costs_are_those_of_the_module(word, first):
    made, model, seat = mixer(word, first)
    shape = attention_shape(model, word, seat)
    cost = total(type(made).parts(model, seat, shape.settings))
    assert cost.parameters == sum(p.numel() for p in made.parameters())
    if word not in ("gat", "gatv2"):  # their edges depend on the family, which a shape does not name
        assert cost.flops == mechanism(word).flops(shape)


@pytest.mark.parametrize("word", ["gat", "gatv2"])
@pytest.mark.parametrize("causal", [False, True])
def test_costs_of_graphs_of_text_are_those_of_the_row(word, causal):
    _, model, seat = mixer(word, family="gpt", causal=causal, tokens=23)
    shape = attention_shape(model, word, seat)
    parts = type(build_mixer(model, seat)).parts(model, seat, shape.settings)
    assert total(parts).flops == mechanism(word).flops(shape)


def test_what_begins_otherwise():
    model = config.Model(family="vit", init={"scheme": "vit"})
    assert rule("model.blocks.0.attention.offsets.weight", (64, 8), model).value == 0
    assert rule("model.blocks.0.attention.amounts.weight", (64, 8), model).value == 0
    conv = rule("model.blocks.0.attention.q_conv", (8, 9), model)
    assert (conv.kind, conv.value) == ("uniform", 1 / 3)


def job(word, objective=None, **attention):
    model = {
        "family": "vit", "layers": 2, "hidden": WIDTH, "heads": 4, "vision": {"patch": 2},
        "attention": {"mechanism": word, **attention},
    }  # fmt: skip
    return Job.model_validate(
        {
            "model": model,
            "data": {"images": {"size": 8}},
            "objective": {"name": "classify"} | (objective or {}),
        }
    )


@pytest.mark.parametrize("word", WORDS)
def test_it_learns_in_a_model(word):
    made = build_objective(job(word, {"pool": "mean"}), Inputs(length=17, image=8, channels=3, classes=2))
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(16, 3, 8, 8, generator=generator)
    labels = torch.arange(16) % 2
    x[labels == 1, 0, :4] += 1.0
    optimizer = torch.optim.Adam(made.parameters(), 3e-3)
    losses = []
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(made.logits(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())


def test_dropout_of_weights_depends_on_places_alone():
    for word in ("nonlocal", "cvt"):
        made, *_ = mixer(word, dropout=0.3)
        x = tokens(SIDE**2 + 1)
        noise = Noise.at(0, 3, torch.tensor([5, 9]))
        whole = made(x, Mask(False), noise=noise)[0]
        assert not torch.allclose(whole, made(x, Mask(False))[0])
        alone = made(x[1:], Mask(False), noise=noise._replace(slots_B=torch.tensor([9])))[0]
        torch.testing.assert_close(whole[1:], alone, **ROUNDINGS)


def test_what_is_refused():
    from headway.pretrain.config.rules import check

    for word in WORDS:
        check(job(word))
        with pytest.raises(JobError, match=r"masked autoencoder reads some of the patches"):
            check(job(word, {"name": "mae"}))
    with pytest.raises(JobError, match=r"model\.attention\.kernel_size = 4.*odd"):
        mixer("cvt", kernel_size=4)
    with pytest.raises(JobError, match=r"model\.attention\.mechanism = 'se'"):
        check(Job.model_validate({"model": {"family": "bert", "attention": {"mechanism": "se"}},
                                  "objective": {"name": "masked"}}))  # fmt: skip
