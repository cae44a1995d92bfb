"""Blocks with a bottleneck against transformers' MobileBERT: hidden states and attention of every layer, in fp64."""

import pytest
import torch
from torch import nn

from headway.pretrain.config import Job
from headway.pretrain.hf.folder import tree_of
from headway.pretrain.hf.links import Lazy, to_ours
from headway.pretrain.hf.mobilebert import MOBILEBERT
from headway.pretrain.models.bert import BERT
from headway.pretrain.models.init import initialise
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.layers import Noise
from headway.pretrain.models.maps import attention_maps
from headway.pretrain.models.seat import Seat
from headway.pretrain.models.transformer import Context, build_block

VOCAB, LENGTH, ROWS = 61, 13, 3
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 30, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 26,
    "max_position_embeddings": LENGTH, "embedding_size": 7, "intra_bottleneck_size": 12, "layer_norm_eps": 1e-5,
}  # fmt: skip
WIDER = {"intra_bottleneck_size": 48, "normalization_type": "layer_norm", "num_feedforward_networks": 1}
KINDS = {
    "MobileBERT": {},
    "MobileBERT with LayerNorm": {"normalization_type": "layer_norm"},
    "MobileBERT-tiny": {"use_bottleneck_attention": True, "key_query_shared_bottleneck": False,
                        "num_feedforward_networks": 2},
    "inverted": WIDER | {"hidden_act": "gelu"},
    "IB-BERT": WIDER | {"hidden_act": "gelu", "key_query_shared_bottleneck": False},
}  # fmt: skip


def pair_of(kind):
    """transformers' model with arbitrary weights, and ours with the same."""
    from transformers import MobileBertConfig, MobileBertModel

    torch.manual_seed(0)
    settings = MobileBertConfig(**SHAPE | KINDS[kind], attn_implementation="eager")
    theirs = MobileBertModel(settings)
    if (
        kind == "IB-BERT"
    ):  # whose queries and keys transformers gives the block's input, and no layer of its width
        for layer in theirs.encoder.layer:
            own = layer.attention.self
            own.query, own.key = nn.Linear(30, 48), nn.Linear(30, 48)
    theirs = theirs.double().eval()
    for p in theirs.parameters():
        p.data += torch.randn_like(p) * 0.3
    named = {f"mobilebert.{name}": p.detach() for name, p in theirs.named_parameters()}
    job = Job.model_validate(tree_of(MOBILEBERT.to_model(settings.to_dict(), frozenset(named))))
    ours = BERT(job.model, Inputs(VOCAB, LENGTH)).double().eval()
    source = Lazy(frozenset(named), named.__getitem__)
    weights = dict(to_ours(MOBILEBERT.links(job), source))
    ours.load_state_dict({name.removeprefix("model."): tensor for name, tensor in weights.items()})
    assert sum(t.numel() for t in weights.values()) == sum(p.numel() for p in theirs.parameters())
    return ours, theirs


def batch():
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, VOCAB, (ROWS, LENGTH), generator=draw)
    seen = torch.arange(LENGTH) < torch.tensor([LENGTH, LENGTH - 4, 5])[:, None]
    return tokens, seen, torch.randint(0, 2, (ROWS, LENGTH), generator=draw)


def states(ours, *inputs):
    """What goes into the first block, and what comes out of each."""
    found = []
    first = ours.blocks[0].register_forward_pre_hook(lambda _, given: found.append(given[0]))
    hooks = [block.register_forward_hook(lambda _, __, out: found.append(out[0])) for block in ours.blocks]
    hidden = ours(*inputs)
    for hook in (first, *hooks):
        hook.remove()
    return found, hidden


@pytest.mark.parametrize("kind", KINDS)
def test_states_and_attention_of_all_layers_are_those_of_transformers(kind):
    ours, theirs = pair_of(kind)
    tokens, seen, segments = batch()
    given = {"attention_mask": seen.long(), "token_type_ids": segments}
    expected = theirs(tokens, **given, output_hidden_states=True, output_attentions=True)
    found, hidden = states(ours, tokens, seen.int() - 1, segments)
    maps = attention_maps(ours, tokens, seen.int() - 1, segments)
    # fp64; sums of up to 48 products in another order, in three layers without norms: 1e-13 of the largest
    assert len(found) == len(expected.hidden_states) == 4
    for a, b in zip(found, expected.hidden_states, strict=True):
        torch.testing.assert_close(a[seen], b[seen], rtol=1e-10, atol=1e-10)
    for a, b in zip(maps, expected.attentions, strict=True):
        a, b = a.transpose(1, 2)[seen], b.transpose(1, 2)[seen]
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(hidden.pooled, expected.pooler_output, rtol=1e-10, atol=1e-10)


def test_dropout_is_of_what_a_block_adds_alone():
    """As in transformers: nothing inside is dropped, and all that the bottleneck gives is."""
    shape = {"family": "bert", "layers": 2, "hidden": 24, "heads": 3, "norm_position": "post", "norm": "none",
             "dropout": 0.5, "bottleneck": {"hidden": 12, "ffns": 2}}  # fmt: skip
    model = Job.model_validate({"model": shape, "objective": {"name": "masked"}}).model
    block = build_block(model, Seat(tokens=LENGTH), 2).double()
    initialise(block, model, 0)
    x = torch.randn(2, LENGTH, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    added, dropped = (
        block(x, Context(noise=noise))[0] - x for noise in (None, Noise.at(0, 0, torch.arange(2)))
    )
    kept = dropped != 0
    assert 0.4 < kept.double().mean() < 0.6  # of 624 elements: five deviations
    # fp64; what is added is 1e-4 of x, which takes 4 digits off
    torch.testing.assert_close(dropped[kept], 2 * added[kept], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("reads", ["shared", "outside", "inside"])
def test_a_block_may_answer_for_its_first_places(reads):
    shape = {"family": "vit", "layers": 2, "hidden": 24, "heads": 3, "norm_position": "post",
             "bottleneck": {"hidden": 36, "reads": reads, "ffns": 2}}  # fmt: skip
    model = Job.model_validate({"model": shape, "objective": {"name": "classify"}}).model
    block = build_block(model, Seat(tokens=LENGTH), 2).double()
    initialise(block, model, 0)
    x = torch.randn(2, LENGTH, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole, first = block(x, Context())[0], block(x, Context(outputs=2))[0]
    torch.testing.assert_close(first, whole[:, :2], rtol=1e-12, atol=1e-13)  # fp64, the same sums
