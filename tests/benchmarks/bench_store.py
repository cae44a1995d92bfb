"""Token stores: writing against a plain `sentencepiece` loop, reading against Megatron's IndexedDataset.

Both sides of a ratio run in turns; a ratio is the median of theirs over the median of ours, so above 1 we are
faster. The text is the Python standard library (about 11 MB), on two processes.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from headway.pretrain import config
from headway.pretrain.data.build import build_store
from headway.pretrain.data.store import TokenStore, part
from headway.pretrain.data.text import File, find_files
from headway.pretrain.data.tokenizer import SentencePieceTokenizer
from headway.pretrain.data.tokenizer_training import train_sentencepiece

ROUNDS = 5
ROW = 257
SOURCE = config.Source(path="stdlib:")


def ratio(theirs: Callable[[], object], ours: Callable[[], object]) -> tuple[float, float, float]:
    """Theirs / ours, and both medians in seconds, of interleaved runs after one that does not count."""
    seconds: dict[Callable[[], object], list[float]] = {theirs: [], ours: []}
    for turn in range(ROUNDS + 1):
        for side in (theirs, ours) if turn % 2 else (ours, theirs):
            start = time.perf_counter()
            side()
            if turn:
                seconds[side].append(time.perf_counter() - start)
    their_median, our_median = statistics.median(seconds[theirs]), statistics.median(seconds[ours])
    return their_median / our_median, their_median, our_median


def plain_loop(files: list[File], model: bytes, prefix: Path) -> None:
    """What a script without Headway does, with the same documents in the same order."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(sp.vocab_size()))
    for file in files:
        if text := file.path.read_bytes().decode():
            ids = [*sp.encode(text), sp.eos_id()]
            builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")


def writing(folder: Path, files: list[File], model: bytes, label: str) -> None:
    data = config.Data(heldout=0.0, workers=2)
    size = sum(file.size for file in files)

    def ours() -> None:
        shutil.rmtree(folder / "ours", ignore_errors=True)
        tokenizer = SentencePieceTokenizer(model)  # as new: it remembers lines that it has seen
        build_store(SOURCE, tokenizer, data, files, folder / "ours", progress=False)

    times, theirs, own = ratio(lambda: plain_loop(files, model, folder / "theirs"), ours)
    for suffix in (".bin", ".idx"):
        same = (
            part(folder / "ours" / "train", suffix).read_bytes()
            == part(folder / "theirs", suffix).read_bytes()
        )
        assert same, f"the {suffix} files differ"
    speeds = f"{size / theirs / 1e6:.2f} -> {size / own / 1e6:.2f} MB/s"
    print(f"writing, {label:<44} {times:5.2f}x   {speeds}, byte for byte equal", flush=True)


def reading(prefix: Path) -> None:
    megatron, store = IndexedDataset(str(prefix)), TokenStore(prefix)
    begins = megatron.index.sequence_pointers // megatron.index.dtype_size
    generator = np.random.default_rng(0)
    order = generator.integers(0, store.documents, 20_000).tolist()
    starts = generator.integers(0, store.tokens - ROW, 20_000).tolist()

    def report(
        label: str, theirs: Callable[[], list[np.ndarray]], ours: Callable[[], list[np.ndarray]]
    ) -> None:
        assert all(map(np.array_equal, theirs(), ours()))
        times, their_median, our_median = ratio(theirs, ours)
        print(f"reading, {label:<44} {times:5.2f}x   {their_median:.3f} -> {our_median:.3f} s", flush=True)

    report(
        "20,000 random documents",
        lambda: [megatron[i] for i in order],
        lambda: [store.document(i) for i in order],
    )
    report(
        f"20,000 random rows of {ROW} tokens, copied",
        lambda: [megatron_row(megatron, begins, start) for start in starts],
        lambda: [store.read(start, ROW).copy() for start in starts],
    )


def megatron_row(megatron: IndexedDataset, begins: np.ndarray, start: int) -> np.ndarray:
    """A row of the packed stream as Megatron's GPTDataset makes it: a `get` for each document in it."""
    document = int(np.searchsorted(begins, start, side="right")) - 1
    offset, length, parts = start - int(begins[document]), ROW, []
    while length:
        count = min(length, int(megatron.sequence_lengths[document]) - offset)
        parts.append(megatron.get(document, offset, count))
        document, offset, length = document + 1, 0, length - count
    return np.concatenate(parts)


def plain_model(files: list[File]) -> bytes:
    """A BPE model as `sentencepiece` trains it by default, except that it loses no text."""

    class Model:
        content = b""

        def write(self, content: bytes) -> None:
            self.content = content

    lines = (line for file in files[:200] for line in file.path.read_text(encoding="utf-8").splitlines())
    model = Model()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=4096,
        byte_fallback=True,
        minloglevel=2,
    )
    return model.content


def main() -> None:
    files = [file for file in find_files(SOURCE) if file.size]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        texts = (file.path.read_bytes().decode() for file in files[:200])
        train_sentencepiece(texts, 4096, folder / "tokenizer.model")
        writing(folder, files, (folder / "tokenizer.model").read_bytes(), "a tokenizer trained by Headway")
        reading(folder / "ours" / "train")
        shutil.rmtree(folder / "ours")
        writing(folder, files, plain_model(files), "a model trained by sentencepiece's defaults")


if __name__ == "__main__":
    main()
