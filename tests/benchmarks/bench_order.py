"""Opening a token store and drawing the first batch: as long for a million tokens as for a trillion.

The stores are sparse files in Megatron's layout, so a trillion tokens take 20 MB of disk. Prints the median
time of each size and its ratio to the smallest, and what one shuffled table of rows costs beside it.
"""

from __future__ import annotations

import os
import statistics
import struct
import tempfile
import time
from pathlib import Path

import numpy as np

from headway.pretrain.data.store import TokenStore
from headway.pretrain.data.stream import SampleStream
from headway.pretrain.data.token_rows import TokenRows

SIZES = {10**6: 10**3, 10**9: 10**6, 10**12: 10**6}
"""Tokens -> documents. Lengths of documents are int32, and their table is the part that is not sparse."""

SEQ_LEN, GLOBAL_BATCH, REPEATS = 1024, 32, 25
UINT16 = 8


def write_sparse(prefix: Path, tokens: int, documents: int) -> None:
    """A store of uint16 tokens, all 0: an index in full, and a `.bin` that is one hole."""
    lengths = np.full(documents, tokens // documents, dtype=np.int32)
    begins = np.arange(documents, dtype=np.int64) * (tokens // documents) * 2
    with open(f"{prefix}.idx", "wb") as index:
        index.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, UINT16, documents, documents + 1))
        for table in (lengths, begins, np.arange(documents + 1, dtype=np.int64)):
            index.write(table.tobytes())
    with open(f"{prefix}.bin", "wb") as stream:
        os.truncate(stream.fileno(), 2 * tokens)


def first_batch(prefix: Path, seed: int) -> float:
    """Seconds from nothing to the arrays of the first global batch."""
    begin = time.perf_counter()
    stream = SampleStream([("corpus", TokenRows(TokenStore(prefix), SEQ_LEN, 0, 50257), 1.0)], seed)
    rows = stream.batch(0, GLOBAL_BATCH)
    seconds = time.perf_counter() - begin
    assert rows["tokens"].shape == (GLOBAL_BATCH, SEQ_LEN + 1)
    return seconds


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        stores = {tokens: Path(folder) / f"{tokens:.0e}" for tokens in SIZES}
        for tokens, prefix in stores.items():
            write_sparse(prefix, tokens, SIZES[tokens])
            first_batch(prefix, 0)
        times: dict[int, list[float]] = {tokens: [] for tokens in SIZES}
        for seed in range(REPEATS):
            for tokens, prefix in stores.items():
                times[tokens].append(first_batch(prefix, seed))
    print(f"open a store and draw {GLOBAL_BATCH} rows of {SEQ_LEN}, median of {REPEATS}")
    smallest = statistics.median(times[min(SIZES)])
    for tokens, seconds in times.items():
        median, (low, _, high) = statistics.median(seconds), statistics.quantiles(seconds, n=4)
        spread = f"quartiles {low * 1e3:.2f} to {high * 1e3:.2f}"
        print(f"  {tokens:.0e} tokens: {median * 1e3:6.2f} ms ({spread})  ratio {median / smallest:.2f}")
    shuffles = []
    for seed in range(5):
        begin = time.perf_counter()
        np.random.default_rng(seed).permutation(10**9 // SEQ_LEN)
        shuffles.append(time.perf_counter() - begin)
    median = statistics.median(shuffles) * 1e3
    print(f"  beside it, one stored shuffle of the 1e+09 store's rows: {median:.2f} ms")


if __name__ == "__main__":
    main()
