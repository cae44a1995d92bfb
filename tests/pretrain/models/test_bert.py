"""BERT's own: packed documents, padding, blocks that are used again and again (ALBERT)."""

import pytest
import torch

from headway.pretrain.config import Job
from headway.pretrain.models.bert import BERT
from headway.pretrain.models.init import initialise
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.layers import Noise

VOCAB, LENGTH = 41, 12


def made(**model):
    shape = {"family": "bert", "layers": 2, "hidden": 24, "heads": 3, "segments": 2, "pooler": True, **model}
    job = Job.model_validate({"model": shape, "objective": {"name": "masked"}})
    ours = BERT(job.model, Inputs(VOCAB, LENGTH)).double()
    initialise(ours, job.model, 0)
    return ours


def tokens(rows=2):
    return torch.randint(0, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("positions", ["rotary", "none"])
@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_packed_documents_are_separate_rows(positions, norm_position):
    """With positions that only distances tell, a document does not know where it stands."""
    ours, x = made(positions=positions, norm_position=norm_position), tokens()
    documents = torch.tensor([0] * 5 + [1] * 4 + [-1] * 3).expand(2, -1)
    packed = ours(x, documents)
    for part in (slice(0, 5), slice(5, 9)):
        # fp64: the same sums, with zeros among them, and rotations by other angles
        torch.testing.assert_close(packed.final[:, part], ours(x[:, part]).final, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(packed.pooled, ours(x[:, :5]).pooled, rtol=1e-11, atol=1e-12)


def test_tokens_see_those_after_them():
    ours, x = made(), tokens()
    other = x.clone()
    other[:, -1] = (other[:, -1] + 1) % VOCAB
    assert (ours(x).final[:, 0] != ours(other).final[:, 0]).all()


def test_no_segments_are_the_first_segment():
    ours, x = made(), tokens()
    assert torch.equal(ours(x).final, ours(x, None, torch.zeros_like(x)).final)
    assert not torch.equal(ours(x).final, ours(x, None, torch.ones_like(x)).final)


def test_shared_blocks_are_a_deep_model_of_equal_blocks():
    shared = made(layers=6, unique_layers=2, dropout=0.3)
    deep = made(layers=6, dropout=0.3)
    weights = shared.state_dict()
    long = {k: weights[k.replace(f"blocks.{i}.", f"blocks.{i // 3}.")] for i in range(6)
            for k in deep.state_dict() if f"blocks.{i}." in k}  # fmt: skip
    deep.load_state_dict(weights | long)
    assert torch.equal(shared(tokens()).final, deep(tokens()).final)


def test_shared_blocks_drop_anew_at_every_use():
    ours, x = made(layers=4, unique_layers=2, dropout=0.3, attention={"dropout": 0.3}), tokens()
    keys = []
    for block in ours.blocks:
        for dropout in (block.attention_dropout, block.mlp_dropout, block.attention.dropout):
            dropout.key = lambda noise, kind=type(dropout).key, self=dropout: (
                keys.append(kind(self, noise)) or keys[-1]
            )
    noise = Noise.at(0, 0, torch.arange(2))
    first = ours(x, noise=noise).final
    assert len(keys) == len({int(key) for key in keys}) == 4 * 3
    assert torch.equal(first, ours(x, noise=noise).final)
