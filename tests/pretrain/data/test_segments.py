"""Segment pairs against a plain cutting of the documents, against Megatron's rows, and their statistics."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.kernels.random import philox
from headway.pretrain.config import Data, Source
from headway.pretrain.config import Tokenizer as TokenizerSettings
from headway.pretrain.data.build import train_tokenizer
from headway.pretrain.data.samples import make_keys
from headway.pretrain.data.segments import SegmentPairs, line_ends
from headway.pretrain.data.store import TokenStore, TokenStoreWriter
from headway.pretrain.data.tokenizer import BytesTokenizer, SentencePieceTokenizer
from headway.pretrain.errors import DataError, JobError

PAD, CLS, SEP, END, FIRST = 0, 1, 2, 3, 10


def write(folder: Path, documents: list[list[int]], vocab: int = 100_000, **facts: object) -> TokenStore:
    with TokenStoreWriter(folder / "s", vocab) as writer:
        for tokens in documents:
            writer.add(tokens)
        writer.close(**facts)
    return TokenStore(folder / "s")


class MemoryStore:
    """Documents in memory."""

    def __init__(self, texts):
        self.texts = [np.array(text, np.int32) for text in texts]
        self.documents, self.tokens = len(texts), sum(map(len, texts)) + len(texts)

    def text(self, i, separator):
        return self.texts[i]

    def text_lengths(self, separator):
        return np.array([text.size for text in self.texts], np.int64)


def numbered(lengths):
    """Documents in which every token of the whole store is another: FIRST, FIRST + 1, ..."""
    ends = FIRST + np.cumsum([0, *lengths])
    return [list(range(start, stop)) for start, stop in itertools.pairwise(ends.tolist())]


def pairs(store, kind, seq_len=16, **options):
    return SegmentPairs(store, seq_len, kind, END, CLS, SEP, PAD, "corpus", **options)


def epoch(samples, seed=0):
    numbers = np.arange(len(samples))
    return samples.rows(numbers, make_keys("corpus", seed, numbers.tolist(), [0] * len(samples)))


def parts(rows, i, seps=2):
    """A and B of row i (A alone if it has one [SEP]), by the places of its specials.

    Checks all that the row says of itself; text tokens are FIRST and above, so that specials stand out.
    """
    tokens, segments = rows["tokens"][i], rows["segments"][i]
    ends = np.flatnonzero(tokens == SEP)
    stop = ends[-1] + 1
    assert ends.size == seps
    assert np.flatnonzero(tokens == CLS).tolist() == [0]
    assert (tokens[stop:] == PAD).all()
    assert np.array_equal(rows["documents"][i], np.where(np.arange(tokens.size) < stop, 0, -1))
    assert np.array_equal(rows["maskable"][i], tokens >= FIRST)
    assert np.array_equal(np.flatnonzero(segments), np.arange(ends[0] + 1, stop))
    return tokens[1 : ends[0]].tolist(), tokens[ends[0] + 1 : stop - 1].tolist()


def check_cover(chunks, documents, room):
    """In order of number, the chunks are the documents, of which each has as few as can be."""
    flat = itertools.chain.from_iterable
    assert list(flat(chunks)) == list(flat(documents))
    owner = {token: i for i, document in enumerate(documents) for token in document}
    counts = [0] * len(documents)
    for chunk in chunks:
        assert 1 <= len(chunk) <= room
        assert len({owner[token] for token in chunk}) == 1
        counts[owner[chunk[0]]] += 1
    assert counts == [-(-len(document) // room) for document in documents]


odd_lengths = st.lists(
    st.one_of(st.sampled_from([0, 1, 2, 3]), st.integers(0, 30), st.integers(100, 300)), max_size=12
)


@settings(deadline=None, max_examples=100)
@given(lengths=odd_lengths, seq_len=st.integers(6, 40), seed=st.integers(0, 9))
def test_every_token_is_in_one_chunk(lengths, seq_len, seed):
    documents = numbered(lengths)
    for kind, shortest in (("none", 1), ("order", 2)):
        usable = [document for document in documents if len(document) >= shortest]
        if not usable:
            with pytest.raises(DataError, match=f"corpus: holds 0 documents of {shortest} tokens or more;"):
                pairs(MemoryStore(documents), kind, seq_len)
            continue
        samples = pairs(MemoryStore(documents), kind, seq_len)
        rows = epoch(samples, seed)
        assert samples.left_out == (sum(len(document) == 1 for document in documents) if shortest == 2 else 0)
        if kind == "none":
            assert "label" not in rows
            chunks = [parts(rows, i, seps=1)[0] for i in range(len(samples))]
        else:
            both = [parts(rows, i) for i in range(len(samples))]
            assert all(a and b for a, b in both)
            chunks = [b + a if label else a + b for (a, b), label in zip(both, rows["label"], strict=True)]
        check_cover(chunks, usable, seq_len - (2 if kind == "none" else 3))


@settings(deadline=None, max_examples=100)
@given(lengths=odd_lengths, seq_len=st.integers(6, 40), seed=st.integers(0, 9))
def test_next_takes_the_second_segment_from_another_document(lengths, seq_len, seed):
    """Under the same keys, `order` tells chunk and cut; B is then a run of another document, or what follows."""
    documents = numbered(lengths)
    place = {token: (d, i) for d, document in enumerate(documents) for i, token in enumerate(document)}
    if sum(len(document) > 1 for document in documents) < 2:
        with pytest.raises(DataError, match=r"corpus: holds [01] documents of 2 tokens or more[;,]"):
            pairs(MemoryStore(documents), "next", seq_len)
        return
    rows, known = (epoch(pairs(MemoryStore(documents), kind, seq_len), seed) for kind in ("next", "order"))
    assert np.array_equal(rows["label"], known["label"])
    for i, label in enumerate(rows["label"]):
        (a, b), (first, second) = parts(rows, i), parts(known, i)[:: -1 if label else 1]
        assert a == first
        if not label:
            assert b == second
            continue
        d, begin = place[b[0]]
        assert d != place[a[0]][0]
        assert b == documents[d][begin : begin + len(b)]
        assert begin >= 1
        assert 1 <= len(b) <= len(second)


def test_numbers_are_philoxs():
    """The same words for arrays of NumPy as for tensors, whose words are held to published ones elsewhere."""
    keys = make_keys("x", 0, range(100), [0] * 100)
    rows = pairs(MemoryStore(numbered([9])), "order").rows(np.zeros(100, np.int64), keys)
    words = philox(torch.from_numpy(keys), 0, 0, 0, 0x70616972)
    assert np.array_equal(rows["label"], words[0] >> 31)
    a = [parts(rows, i)[int(label)] for i, label in enumerate(rows["label"])]
    assert [len(each) for each in a] == (1 + (words[1] * 8 >> 32)).tolist()


def test_of_two_documents_each_is_the_others_partner():
    rows = epoch(pairs(MemoryStore(numbered([0, 400, 1, 400])), "next"))
    owners = (rows["tokens"] - FIRST) // 401  # 400 tokens, then the one of the third document
    for i, label in enumerate(rows["label"]):
        a, b = (set(owners[i][rows["maskable"][i] & (rows["segments"][i] == k)]) for k in (0, 1))
        assert len(a) == len(b) == 1
        assert (a != b) == label


@pytest.mark.parametrize("kind", ["next", "order"])
def test_half_of_the_labels_are_one(kind):
    """Binomial(6000, 1/2) has deviation 39: five of them. In another epoch, other samples are chosen."""
    samples = pairs(MemoryStore(numbered([13] * 6000)), kind)
    first, second = epoch(samples)["label"], epoch(samples, seed=1)["label"]
    for label in (first, second, first ^ second):
        assert abs(int(label.sum()) - 3000) < 5 * 39


def test_cuts_and_partners_are_uniform():
    """Chi-square of 12 cuts (11 degrees: mean 11, deviation 4.7) and of 40 partners (mean 38, deviation 8.7).

    A partner's B is drawn from chunks of 13 that leave it as many tokens as the B that it replaces.
    """
    samples = pairs(MemoryStore(numbered([13] * 40)), "next")
    numbers = np.zeros(12_000, np.int64)
    rows = samples.rows(numbers, make_keys("x", 0, range(12_000), [0] * 12_000))
    cuts = np.bincount((rows["segments"] == 0).argmin(1) - 2, minlength=13)[1:]
    assert ((cuts - 1000) ** 2 / 1000).sum() < 11 + 6 * 4.7
    other = rows["label"] == 1
    last = (rows["maskable"] * rows["tokens"]).max(1)[other]
    partners = np.bincount((last - FIRST) // 13, minlength=40)
    expected = other.sum() / 39
    assert partners[0] == 0
    assert ((partners[1:] - expected) ** 2 / expected).sum() < 38 + 6 * 8.7


def test_length_and_beginning_do_not_tell_the_label():
    """Where documents are long enough, rows are equally full under both labels, and no B begins a document."""
    documents = numbered([130] * 50)
    rows = epoch(pairs(MemoryStore(documents), "next"))
    assert (rows["documents"] == 0).all()
    begins = {document[0] for document in documents}
    assert not any(parts(rows, i)[1][0] in begins for i in range(len(rows["label"])))


@pytest.mark.parametrize("kind", ["none", "next", "order"])
def test_a_row_depends_on_its_number_and_key_alone(kind):
    samples = pairs(MemoryStore(numbered([5, 200, 2, 40, 77])), kind)
    whole, again = epoch(samples), epoch(samples)
    numbers = np.arange(len(samples))[::-3]
    few = samples.rows(
        numbers, np.array(make_keys("corpus", 0, range(len(samples)), [0] * len(samples)))[numbers]
    )
    for name, array in whole.items():
        assert np.array_equal(array, again[name])
        assert np.array_equal(array[numbers], few[name])
    if kind != "none":
        assert not np.array_equal(whole["tokens"], epoch(samples, seed=1)["tokens"])
    assert {
        name: len(array) for name, array in samples.rows(numbers[:0], numbers[:0]).items()
    } == dict.fromkeys(whole, 0)


def test_chunks_are_cut_after_breaks():
    """Multiples of 4 end a line. Another document's B begins after one too, but in its last chunk, of which it
    may need more than what follows the last break.
    """
    rows = epoch(pairs(MemoryStore(numbered([130] * 20)), "next", breaks=np.arange(3000) % 4 == 0))
    for i in range(len(rows["label"])):
        a, b = parts(rows, i)
        assert a[-1] % 4 == 0
        assert (b[0] - 1) % 4 == 0 or (rows["label"][i] and (b[0] - FIRST) % 130 >= 117)


def test_chunks_without_breaks_are_cut_anywhere():
    """All nine places of a chunk whose only break is its last token: each is missed with chance (8/9)^300."""
    samples = pairs(MemoryStore([list(range(10, 20))]), "order", breaks=np.arange(100) == 19)
    rows = samples.rows(np.zeros(300, np.int64), make_keys("x", 0, range(300), [0] * 300))
    cuts = {parts(rows, i)[int(rows["label"][i])][-1] for i in range(300)}
    assert cuts == set(range(10, 19))


def test_rows_are_megatrons(tmp_path):
    """Documents of two lines have one cut. Megatron's [CLS], [SEP], types, padding and swap are the same."""
    theirs = pytest.importorskip("megatron.core.datasets.bert_dataset").BERTMaskedWordPieceDataset

    class Unmasked(theirs):
        def __init__(self, sentences, seed):
            self.sample_index, self.dataset, self._pad_token_id = [(0, 2, 16)], sentences, PAD
            tokenizer = SimpleNamespace(cls=CLS, sep=SEP)
            self.config = SimpleNamespace(
                random_seed=seed, sequence_length=16, classification_head=True, tokenizer=tokenizer
            )

        def _create_masked_lm_predictions(self, tokens, *_):
            return tokens, [], [], [], []

    cuts = [1 + i % 9 for i in range(40)]
    documents = numbered([1 + cut + i % 3 for i, cut in enumerate(cuts)])
    breaks = np.zeros(1000, bool)
    breaks[[document[cut - 1] for document, cut in zip(documents, cuts, strict=True)]] = True
    store = write(tmp_path, [[*document, END] for document in documents])
    rows = epoch(pairs(store, "order", breaks=breaks))
    for i, (document, cut) in enumerate(zip(documents, cuts, strict=True)):
        samples = (Unmasked([document[:cut], document[cut:]], seed)[0] for seed in range(100))
        sample = next(each for each in samples if each["is_random"] == rows["label"][i])
        assert np.array_equal(rows["tokens"][i], sample["text"])
        assert np.array_equal(rows["segments"][i], sample["types"])
        assert np.array_equal(rows["documents"][i] == 0, sample["padding_mask"])
    assert set(rows["label"]) == {0, 1}


@pytest.mark.parametrize("facts", [{}, {"separator": END}])
def test_separators_are_no_text(tmp_path, facts):
    """Of stores written here, which say so, and elsewhere, where some documents may end without."""
    ended = [[10, 11, END], [END], [12, END, 13, 14, END]]
    store = write(tmp_path, ended + ([] if facts else [[15, 16], [], [17]]), **facts)
    texts = [[10, 11], [], [12, END, 13, 14]] + ([] if facts else [[15, 16], [], [17]])
    assert [store.text(i, END).tolist() for i in range(store.documents)] == texts
    assert store.text_lengths(END).tolist() == [len(text) for text in texts]
    rows = epoch(pairs(store, "none"))
    assert rows["tokens"][1].tolist() == [CLS, 12, END, 13, 14, SEP] + [PAD] * 10


def test_sequences_of_megatrons_documents_are_one_text(tmp_path):
    builder = pytest.importorskip("megatron.core.datasets.indexed_dataset").IndexedDatasetBuilder
    megatron = builder(str(tmp_path / "s.bin"), dtype=np.uint16)
    for tokens, sizes in (([11, 12, 13, END], [1, 3]), ([], []), ([14, 15, 16], [3]), ([], [])):
        if tokens:
            megatron.add_document(torch.tensor(tokens), sizes)
        else:
            megatron.end_document()
    megatron.finalize(str(tmp_path / "s.idx"))
    assert TokenStore(tmp_path / "s").text_lengths(END).tolist() == [3, 0, 3, 0]


def test_identity_and_errors():
    store = MemoryStore(numbered([20, 30]))
    assert pairs(store, "next").identity == {"tokens": 52, "documents": 2, "seq_len": 16, "pairs": "next"}
    with pytest.raises(JobError, match=r"data\.seq_len = 5: .* Nearest legal choice: 6"):
        pairs(store, "order", seq_len=5)
    with pytest.raises(
        DataError, match=r"corpus: holds 1 .*another document; .*objective\.masking\.pairs=order"
    ):
        pairs(MemoryStore(numbered([20, 1])), "next")
    with pytest.raises(
        DataError, match="corpus, document 1: token 40 at offset 10 is not in the vocabulary of 40"
    ):
        epoch(pairs(store, "order", vocab=40))


def test_line_ends(tmp_path):
    assert np.flatnonzero(line_ends(BytesTokenizer())).tolist() == [ord("\n")]
    (tmp_path / "a.txt").write_text("def f(x):\n    return x\n\n" * 200)
    settings = TokenizerSettings(vocab=280)
    data = Data(sources=[Source(path=str(tmp_path / "a.txt"))], heldout=0.0, tokenizer=settings)
    path = train_tokenizer(data, tmp_path / "a.model", progress=False)
    tokenizer = SentencePieceTokenizer(path.read_bytes())
    ends = line_ends(tokenizer)
    ids = np.array(tokenizer.encode("def f(x):\n    return x\n"))
    assert ends.shape == (tokenizer.vocab,)
    pieces = [tokenizer.decode([i]) for i in ids.tolist()]
    assert [piece.endswith("\n") for piece in pieces] == ends[ids].tolist()
    assert 1 <= ends[ids].sum() <= 2
