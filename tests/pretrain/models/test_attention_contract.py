"""What every registered attention mechanism must be: layers of a model, tested by what the registry says alone."""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from headway.kernels.attention.masks import Mask, lower
from headway.kernels.attention.registry import mechanism, words
from headway.kernels.attention.rows import ELEMENTS
from headway.kernels.rotary import rotation
from headway.pretrain import config
from headway.pretrain.models.attention import attention_shape, word_of
from headway.pretrain.models.cost import total
from headway.pretrain.models.init import initialise
from headway.pretrain.models.layers import Noise
from headway.pretrain.models.mixers import MIXERS, build_mixer
from headway.pretrain.models.seat import Seat
from headway.pretrain.models.sizes import _mixer

SMALL = {
    "window": 9, "dilation": 3, "block": 8, "neighbours": 1, "stride": 8, "summaries": 2, "global_tokens": 3,
    "random_blocks": 1, "selected": 3, "clusters": 3, "features": 16, "rank": 8, "query_rank": 6, "rotary_dim": 4,
    "latents": 5, "depth": 2, "width": 8, "span": 12, "ramp": 4, "points": 2, "reduction": 4, "kernel_size": 3,
}  # fmt: skip
"""Settings at which rows of 53 tokens show what they do."""
TOGETHER = (
    "window+sink",
    "bigbird+entmax15",
    "dilated+cosine+sparsemax",
    "fixed+softcap+sigmoid",
    "strided+additive",
    "window+softcap+reinforce",
)
"""Some compositions."""
NAMES = (*words(), *TOGETHER)
DOCUMENTS = torch.tensor([[0] * 16 + [1] * 24 + [2] * 13, [7] * 53])
PADDED = torch.tensor([[0] * 40 + [-1] * 13, [0] * 53])
ROWS, TOKENS, HIDDEN, HEADS = 2, 53, 24, 4


def supports(name):
    return mechanism(name).supports


def shape_of(name, heads=HEADS, **attention):
    """The config of a model with the mechanism, at small settings."""
    small = {k: v for k, v in SMALL.items() if k in mechanism(name).settings}
    return config.Model(
        family="vit" if "images" in supports(name) else "gpt",
        hidden=HIDDEN,
        heads=heads,
        kv_heads=2 if "grouped" in supports(name) else heads,
        attention=config.Attention(mechanism=name, **small, **attention),
    )


def seat_of(name, causal=None, tokens=None):
    causal = "causal" in supports(name) if causal is None else causal
    return Seat(1, causal, tokens=tokens or (17 if "images" in supports(name) else TOKENS))


def layer_of(name, kernel="auto", causal=None, dtype=torch.float64, tokens=None, dropout=0.0):
    """A layer with the mechanism, with weights that say something."""
    model, seat = shape_of(name, kernel=kernel, dropout=dropout), seat_of(name, causal, tokens)
    layer = build_mixer(model, seat).to(dtype)
    for buffer in layer.buffers():
        assert buffer.dtype == torch.int64 or buffer.is_floating_point()
    initialise(layer, model.model_copy(update={"init": config.Init(scheme="normal", std=0.3)}), seed=5)
    return layer


def inputs(name, rows=ROWS, tokens=None, dtype=torch.float64):
    tokens = tokens or seat_of(name).tokens
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, tokens, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)


def masks(name):
    """Masks that the mechanism supports: name -> mask."""
    can, found = supports(name), {}
    for side, causal in (("causal", True), ("bidirectional", False)):
        if side in can:
            found[side] = Mask(causal)
            if "images" not in can:
                found |= {f"{side} documents": Mask(causal, DOCUMENTS)} if "documents" in can else {}
                found |= {f"{side} padded": Mask(causal, PADDED)} if "padding" in can else {}
    return found


CASES = [(name, mask) for name in NAMES for mask in masks(name)]
KERNELS = [
    (name, kernel, mask)
    for name, mask in CASES
    for kernel in mechanism(name).kernels_on("cpu")
    if kernel != "reference"
]


def run(layer, x, mask, noise=None):
    y, _ = layer(x, mask, None, noise)
    return y


def value_and_gradients(layer, x, mask, noise=None):
    """Output, and gradients of it and of what the layer gives the loss beside."""
    x = x.clone().requires_grad_()
    y, beside = layer(x, mask, None, noise)
    chosen = beside and beside.choice
    outputs, generator = [y, *(chosen or ())], torch.Generator().manual_seed(2)
    upstream = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in outputs]
    parameters = dict(layer.named_parameters())
    found = torch.autograd.grad(outputs, [x, *parameters.values()], upstream, allow_unused=True)
    return y, dict(zip(("x", *parameters), found, strict=True))


def test_every_mixer_is_a_word():
    assert set(MIXERS) == {name for name, row in words().items() if row.kind == "mixer"}


def test_settings_are_fields():
    for name, row in words().items():
        missing = [key for key in row.settings if key not in config.Attention.model_fields]
        assert not [key for key in missing if not callable(row.settings[key])], name


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_is(name):
    row = mechanism(name)
    assert row.formula
    assert row.source
    assert row.order
    assert "reference" in row.kernels
    assert {"causal", "bidirectional"} & row.supports
    assert ("maps" in row.supports) == (row.weights is not None)
    assert set(row.drawn) in (set(), set(row.kernels))


@pytest.mark.parametrize(("name", "kernel", "mask"), KERNELS)
def test_kernels_compute_the_reference(name, kernel, mask):
    mask, x = masks(name)[mask], inputs(name)
    found = [value_and_gradients(layer_of(name, k, mask.causal), x, mask) for k in (kernel, "reference")]
    (ours, slopes), (theirs, expected) = found
    # fp64: what is computed in another order differs by some thousand roundings of 1e-16 of values up to a hundred.
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert all(torch.isfinite(s).all() for s in slopes.values() if s is not None)
    for key, slope in expected.items():
        torch.testing.assert_close(slopes[key], slope, rtol=1e-8, atol=1e-8, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name):
    layer = layer_of(name)
    noise = Noise.at(3, 7, torch.arange(ROWS)) if mechanism(name).draws else None
    _, slopes = value_and_gradients(layer, inputs(name), Mask(seat_of(name).causal), noise)
    idle = [key for key, slope in slopes.items() if slope is None or not slope.any()]
    assert idle in ([], ["k.bias"])  # a bias of all keys shifts a row's scores alike


@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize("name", [n for n in NAMES if "causal" in supports(n)])
def test_nothing_comes_from_the_future(name, kernel):
    layer, x, t = layer_of(name, kernel, True), inputs(name, 1), 29
    x.requires_grad_()
    y = run(layer, x, Mask())
    (slope,) = torch.autograd.grad(y[:, : t + 1].square().sum(), x)
    assert slope[:, : t + 1].any()
    # Products of transforms spread roundings of 1e-16 over the whole row; anything else gives exact zeros.
    assert slope[:, t + 1 :].abs().max() < 1e-12
    other = x.detach().clone()
    other[:, t + 1 :] = torch.randn_like(other[:, t + 1 :]) * 3
    torch.testing.assert_close(run(layer, other, Mask())[:, : t + 1], y[:, : t + 1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("name", "mask"), [c for c in CASES if c[1].endswith("padded")])
def test_padding_changes_nothing(name, mask):
    mask, x = masks(name)[mask], inputs(name)
    layer = layer_of(name, causal=mask.causal)
    there = run(layer, x, mask)
    other = x.clone()
    other[0, 40:] = 5 * torch.randn_like(other[0, 40:])
    torch.testing.assert_close(run(layer, other, mask)[0, :40], there[0, :40], rtol=1e-11, atol=1e-11)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(run(layer, leaf, mask)[0, :40].square().sum(), leaf)
    assert not slope[0, 40:].any()


@pytest.mark.parametrize(("name", "mask"), [c for c in CASES if c[1].endswith("documents")])
def test_packed_documents_are_separate_ones(name, mask):
    mask, x = masks(name)[mask], inputs(name)
    layer = layer_of(name, causal=mask.causal)
    packed = run(layer, x, mask)
    for start, stop in ((0, 16), (16, 40), (40, 53)):
        alone = run(layer, x[:1, start:stop], Mask(mask.causal))
        torch.testing.assert_close(packed[:1, start:stop], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [n for n in NAMES if not mechanism(n).estimated])
def test_gradients_are_those_of_finite_differences(name):
    tokens = 10 if "images" in supports(name) else 11
    layer = layer_of(name, tokens=tokens)
    x = (inputs(name, 1, tokens) / 2).requires_grad_()
    parameters = list(layer.parameters())

    def compute(x, *given):
        named = dict(zip(dict(layer.named_parameters()), given, strict=True))
        return torch.func.functional_call(layer, named, (x, Mask(seat_of(name).causal)))[0]

    assert torch.autograd.gradcheck(compute, (x, *parameters), fast_mode=True, atol=1e-5, rtol=1e-4)


CURVED = ("induced", "perceiver")
"""What is dropped goes through norms and further layers, which keep no mean."""


@pytest.mark.parametrize("name", [n for n in NAMES if "dropout" in supports(n) and not mechanism(n).draws])
def test_dropout_keeps_the_mean(name):
    rows, p = 600, 0.25
    layer = layer_of(name, dropout=p)
    x = inputs(name, 1).expand(rows, -1, -1)
    mask = Mask(seat_of(name).causal)
    plain = run(layer, x[:1], mask)
    dropped = run(layer, x, mask, Noise.at(3, 7, torch.arange(rows)))
    assert not torch.equal(dropped[0], dropped[1])
    off = (dropped.mean(0) - plain[0]) / (dropped.std(0) / math.sqrt(rows) + 1e-12)
    assert name in CURVED or off.abs().max() < 6  # 53 x 24 numbers of deviation 1
    again = run(layer, x[5:6], mask, Noise.at(3, 7, torch.tensor([5])))
    torch.testing.assert_close(again, dropped[5:6], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [n for n in NAMES if mechanism(n).draws])
def test_what_is_drawn_depends_on_coordinates_alone(name):
    x, mask = inputs(name, 4), Mask(seat_of(name).causal)
    for kernel in mechanism(name).kernels_on("cpu"):
        layer = layer_of(name, kernel)
        whole = run(layer, x, mask, Noise.at(3, 7, torch.arange(4)))
        part = run(layer, x[2:3], mask, Noise.at(3, 7, torch.tensor([2])))
        torch.testing.assert_close(part, whole[2:3], rtol=1e-10, atol=1e-10)
    reference = layer_of(name, "reference")
    theirs = value_and_gradients(reference, x, mask, Noise.at(3, 7, torch.arange(4)))
    ours = value_and_gradients(layer, x, mask, Noise.at(3, 7, torch.arange(4)))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_state_goes_round(name):
    layer, x, mask = layer_of(name), inputs(name), Mask(seat_of(name).causal)
    other = build_mixer(shape_of(name), seat_of(name)).double()
    other.load_state_dict(layer.state_dict())
    for target, source in zip(other.modules(), layer.modules(), strict=True):
        if isinstance(getattr(source, "salt", None), torch.Tensor):
            target.salt.copy_(source.salt)
    assert torch.equal(run(other, x, mask), run(layer, x, mask))


@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_near(name):
    mask = Mask(seat_of(name).causal)
    exact = layer_of(name)
    rough = layer_of(name, dtype=torch.bfloat16)
    for p, q in zip(exact.parameters(), rough.parameters(), strict=True):
        p.data.copy_(q.data)
    x = inputs(name, dtype=torch.bfloat16)
    ours, theirs = run(rough, x, mask).double(), run(exact, x.double(), mask)
    assert ours.isfinite().all()
    # A chain of projections, scores, weights, values and output rounds some eight times, by 2^-9 relative each, and
    # where scores differ by their rounding, weights do by as much as scores are large (here up to 10).
    assert (ours - theirs).norm() / theirs.norm() < DISCRETE.get(name, 0.1)


DISCRETE: dict[str, float] = {"hard": 1.0, "reinforce": 1.0, "window+softcap+reinforce": 1.0}
"""Where a rounding may change what is selected: the bound is another."""


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_counted(name):
    model, seat = shape_of(name), seat_of(name)
    counted = sum(p.numel() for p in build_mixer(model, seat).parameters())
    assert counted == total(_mixer(model, seat)).parameters


@pytest.mark.parametrize("name", ["dense", "bigbird+entmax15", "delta", "moba", "hyena", "mla"])
def test_compiled_layers_compute_the_same(name):
    torch.compiler.reset()
    layer, x, mask = layer_of(name, dtype=torch.float32), inputs(name, dtype=torch.float32), Mask()
    theirs = value_and_gradients(layer, x, mask)
    layer.compile(backend="aot_eager")
    # fp32; the compiler may order sums otherwise.
    torch.testing.assert_close(value_and_gradients(layer, x, mask), theirs, rtol=1e-4, atol=1e-4)


COMPOSED = [n for n in NAMES if mechanism(n).part is not None]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", COMPOSED)
def test_pairs_are_counted(name, causal):
    row, form = mechanism(name), mechanism(name).part
    shape = attention_shape(shape_of(name), name, seat_of(name, causal))
    seen = lower(form.narrowed(Mask(causal), shape.settings), TOKENS, TOKENS, torch.device("cpu"))
    pairs = TOKENS**2 if seen is None else int(seen.sum())
    products = 4 * shape.heads * shape.dim * pairs
    assert row.flops(shape) == products + form.score.flops(shape, pairs)


def counted_flops(name, tokens):
    # PyTorch's own kernel on CPU is not counted.
    kernel = "reference" if "sdpa" in mechanism(name).kernels else "auto"
    layer, x = layer_of(name, kernel, tokens=tokens), inputs(name, 1, tokens)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(layer, x, Mask(seat_of(name).causal))
    return counter.get_total_flops()


@pytest.mark.parametrize("name", [n for n in NAMES if n not in COMPOSED])
def test_flops_are_counted(name):
    lengths = (65, 257) if "images" in supports(name) else (256, 1024)
    model = shape_of(name)
    declared = [total(_mixer(model, seat_of(name, tokens=n))).flops for n in lengths]
    counted = [counted_flops(name, n) for n in lengths]
    for ours, theirs in zip(declared, counted, strict=True):
        # Blocks compute whole rectangles where a mask cuts through.
        assert 0.45 * ours <= theirs <= 2.2 * ours, (declared, counted)
    assert counted[1] / counted[0] <= 1.35 * declared[1] / declared[0], (declared, counted)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = (t.numel() for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t))
        self.elements = max([self.elements, *found])
        return out


def fast_memory(name):
    return list(mechanism(name).kernels_on("cpu").values())[-1].memory


@pytest.mark.parametrize("name", [n for n in NAMES if "S^2" not in fast_memory(n)])
def test_memory_grows_as_declared(name):
    lengths = (257, 1025) if "images" in supports(name) else (512, 2048)
    found = []
    for n in lengths:
        layer, x = layer_of(name, tokens=n, dtype=torch.float32), inputs(name, 1, n, torch.float32)
        x.requires_grad_()
        with Largest() as largest:
            run(layer, x, Mask(seat_of(name).causal)).sum().backward()
        found.append(largest.elements)
    power = 1.5 if "S^1.5" in fast_memory(name) else 1
    # Four times the tokens; and what fits into a buffer of fixed size may be computed at once.
    assert found[1] <= max(4**power * 1.3 * found[0], ELEMENTS), found


@pytest.mark.parametrize("name", [n for n in NAMES if "rotary" in supports(n)])
def test_positions_turn(name):
    layer, x = layer_of(name), inputs(name)
    turn = rotation(torch.arange(x.shape[1]), layer.head_dim, 10000.0, torch.float64)
    mask = Mask(seat_of(name).causal)
    turned = layer(x, mask, turn)[0]
    assert not torch.allclose(turned, run(layer, x, mask))


@pytest.mark.parametrize("name", [n for n in NAMES if "cross" in supports(n)])
def test_it_looks_across(name):
    model = shape_of(name)
    seat = Seat(1, False, True, TOKENS)
    assert word_of(model.attention, seat) == name
    layer = build_mixer(model, seat).double()
    initialise(layer, model, seed=5)
    x, memory = inputs(name), inputs(name, tokens=31)
    y = layer(x, Mask(False), memory_BME=memory)[0]
    assert y.shape == x.shape
    row = mechanism(name)
    shape = attention_shape(model, name, seat)
    assert row.bytes(shape, 2) == row.bytes(shape, 4) / 2
    assert row.state(shape) >= 0
    assert isinstance(layer, nn.Module)
