"""Tokenizers: no byte is lost, ids agree with the libraries, and training is deterministic."""

import hashlib
import json
import pickle
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.pretrain import config
from headway.pretrain.data.tokenizer import (
    BytesTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    split_lines,
)
from headway.pretrain.data.tokenizer_training import train_sentencepiece
from headway.pretrain.errors import DataError, JobError

CODE = [
    "def main(argument):\n    if argument is None:\n        return None\n\n    return [argument] * 2\n",
    "class Door:\n\tdef open(self):\r\n\t\treturn self\n" * 3,
    "import os\nimport sys\n\n\nfor name in os.environ:\n    print(name, file=sys.stderr)\n" * 5,
]
HARD = [
    "",
    "a\tb  c   \n\n    \r\n\0 no newline at the end",
    "\n\n\n",
    "   ",
    "東京 😀 é e\u0301 \ufeff \u00a0 \u2028",
    "a \u2581 b\u2581\u2581 \u2585",
    "\ue00a\ue009\ue00d stand-ins of the trainer",
    "<unk> <|endoftext|> <0x0A> </s>",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    return train_sentencepiece(CODE, 420, tmp_path_factory.mktemp("trained") / "tokenizer.model")


@pytest.fixture(scope="module")
def byte_level() -> HuggingFaceTokenizer:
    """A byte-level BPE (GPT-2's kind), trained by the library."""
    library = tokenizers.ByteLevelBPETokenizer()
    library.train_from_iterator(CODE, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    return HuggingFaceTokenizer(library.to_str())


@pytest.fixture(params=["trained", "byte_level", "bytes"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return BytesTokenizer() if request.param == "bytes" else request.getfixturevalue(request.param)


def test_protocol(tokenizer: Tokenizer) -> None:
    batch = tokenizer.encode_batch([*HARD, *CODE])
    for text, ids in zip([*HARD, *CODE], batch, strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text) == ids.tolist()
        assert tokenizer.separator not in ids
        assert all(0 <= i < tokenizer.vocab for i in ids.tolist())
    assert tokenizer.decode([tokenizer.separator]) == ""
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.digest == tokenizer.digest
    assert copy.encode(CODE[0]) == tokenizer.encode(CODE[0])


TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.text(
    st.sampled_from(" \n\t\r\0\u2581\u2585ae東😀")
)


@settings(deadline=None, max_examples=300)
@given(text=TEXT)
def test_trained_model_is_lossless_and_line_by_line(trained: SentencePieceTokenizer, text: str) -> None:
    ids = trained.encode_batch([text])[0]
    assert trained.decode(ids).encode() == text.encode()
    assert ids.tolist() == trained.encode(text)
    assert "".join(split_lines(text)) == text


def test_trained_model_works_in_plain_sentencepiece(tmp_path: Path) -> None:
    ours = train_sentencepiece(CODE, 420, path := tmp_path / "a.model")
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert sp.vocab_size() == ours.vocab == 420
    assert sp.eos_id() == ours.separator
    for text in [*HARD, *CODE]:
        assert sp.encode(text) == ours.encode(text)
        assert sp.decode(sp.encode(text)) == text


def test_whitespace_is_merged(trained: SentencePieceTokenizer) -> None:
    """Indentation and the ends of lines are inside of pieces: 80 bytes of code in far fewer tokens."""
    assert len(trained.encode(":\n        return ")) <= 3
    words = "    return None\n"
    assert len(trained.encode(words * 10)) <= 3 * 10


def test_span(tmp_path: Path) -> None:
    line = train_sentencepiece(CODE, 400, tmp_path / "line.model")
    word = train_sentencepiece(CODE, 400, tmp_path / "word.model", span="word")
    count = [sum(map(len, each.encode_batch(CODE))) for each in (line, word)]
    assert count[0] < count[1]
    assert [word.decode(ids) for ids in word.encode_batch(HARD)] == HARD


def test_training_is_deterministic(tmp_path: Path) -> None:
    digests = {train_sentencepiece(CODE, 400, tmp_path / f"{i}.model").digest for i in range(2)}
    assert digests == {hashlib.sha256((tmp_path / "0.model").read_bytes()).hexdigest()}


def test_vocabulary_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(
        JobError, match=r"data\.tokenizer\.vocab = 5000.*Nearest legal choice: \d+"
    ) as too_large:
        train_sentencepiece(["some words, some more words"], 5000, tmp_path / "a.model")
    train_sentencepiece(["some words, some more words"], too_large.value.nearest, tmp_path / "a.model")
    with pytest.raises(JobError, match="must hold 256 bytes") as too_small:
        train_sentencepiece(["".join(map(chr, range(0x400, 0x600)))], 300, tmp_path / "b.model")
    assert isinstance(too_small.value.nearest, int)
    with pytest.raises(DataError, match="no text"):
        train_sentencepiece(["", "\0"], 300, tmp_path / "c.model")


def test_foreign_model_is_encoded_whole(tmp_path: Path) -> None:
    """A model with the library's defaults adds a space in front: lines must not be cut for it."""
    (tmp_path / "text").write_text("".join(CODE))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=40, minloglevel=2
    )
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    ours = load_tokenizer(config.Tokenizer(path=str(tmp_path / "m.model")))
    assert [ids.tolist() for ids in ours.encode_batch(CODE)] == [sp.encode(text) for text in CODE]
    assert ours.separator == sp.eos_id()


def test_hugging_face_special_tokens_and_separator(tmp_path: Path, byte_level: HuggingFaceTokenizer) -> None:
    assert len(byte_level.encode("<|endoftext|>")) > 1
    library = tokenizers.ByteLevelBPETokenizer()
    library.train_from_iterator(CODE, vocab_size=300, special_tokens=["<a>", "</s>"], show_progress=False)
    (tmp_path / "tokenizer.json").write_text(library.to_str())
    settings = config.Tokenizer(kind="huggingface", path=str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(settings).separator == library.token_to_id("</s>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<a>"}}))
    assert load_tokenizer(settings).separator == library.token_to_id("<a>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<b>"}))
    with pytest.raises(DataError, match="end-of-document"):
        load_tokenizer(settings)


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_file_that_is_missing_or_another(tmp_path: Path, kind: str) -> None:
    with pytest.raises(JobError, match=r"data\.tokenizer\.path"):
        load_tokenizer(config.Tokenizer(kind=kind))
    with pytest.raises(DataError, match=r"absent.*does not exist"):
        load_tokenizer(config.Tokenizer(kind=kind, path=str(tmp_path / "absent")))
    (tmp_path / "other").write_bytes(b"\x00\x01neither")
    with pytest.raises(DataError, match=r"other: not a .*kind is " + kind):
        load_tokenizer(config.Tokenizer(kind=kind, path=str(tmp_path / "other")))
