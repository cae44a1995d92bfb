"""Blocks of documents to tokens, in several processes, in order.

This module is imported by every worker: it stays light (no torch, no pydantic).
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from headway.pretrain.data.store import dtype_of
from headway.pretrain.data.text import Block, Document, Malformed, read_documents
from headway.pretrain.data.tokenizer import Tokenizer
from headway.pretrain.errors import DataError


@dataclass(frozen=True)
class Work:
    """What is done to a block.

    Attributes:
        column: field or column that holds the text.
        heldout: share of documents kept out of training.
        skip: malformed lines are left out and reported instead of ending the build.
    """

    tokenizer: Tokenizer
    column: str
    heldout: float
    skip: bool


@dataclass
class Side:
    """Documents of a block on one side of the split: tokens as bytes of the store's dtype, and lengths."""

    stream: bytes
    lengths: npt.NDArray[np.int64]
    utf8_bytes: int


@dataclass
class Encoded:
    """A block, encoded; `cost` is bytes on disk."""

    train: Side
    heldout: Side
    cost: int
    skipped: list[Malformed] = field(default_factory=list)


def is_heldout(name: str, share: float) -> bool:
    """Whether the document of this name is kept out of training: the same on every machine, for ever.

    A document that is kept out at some share is kept out at every larger one.
    """
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2.0**64


def encode_block(block: Block, work: Work) -> Encoded:
    """Encode a block.

    Raises:
        DataError: a line is malformed and not to be skipped.
    """
    train: list[str] = []
    heldout: list[str] = []
    skipped: list[Malformed] = []
    for item in read_documents(block, work.column):
        if isinstance(item, Document):
            (heldout if is_heldout(item.name, work.heldout) else train).append(item.text)
        elif work.skip:
            skipped.append(item)
        else:
            rule = "mend it, or leave such lines out with data.on_error=skip"
            raise DataError(f"{item.where}: {item.reason}; {rule}")
    return Encoded(
        encode_side(train, work.tokenizer), encode_side(heldout, work.tokenizer), block.cost, skipped
    )


def encode_side(texts: list[str], tokenizer: Tokenizer) -> Side:
    """Encode texts, each followed by the separator."""
    separator = np.array([tokenizer.separator], np.int32)
    documents = tokenizer.encode_batch(texts)
    pieces = [array for ids in documents for array in (ids, separator)]
    stream = np.concatenate(pieces).astype(dtype_of(tokenizer.vocab)).tobytes() if pieces else b""
    lengths = np.array([ids.size + 1 for ids in documents], np.int64)
    return Side(stream, lengths, sum(len(text.encode()) for text in texts))


def encode_blocks(blocks: Iterable[Block], work: Work, workers: int) -> Iterator[Encoded]:
    """Encode blocks, in the order in which they come, whatever the number of workers.

    Processes are spawned, not forked, as a fork of a process that has loaded torch may hang. At most a few
    blocks a worker are held at once.

    Raises:
        DataError: a line is malformed; a worker was killed.
    """
    if workers == 1:
        yield from (encode_block(block, work) for block in blocks)
        return
    waiting: deque[Future[Encoded]] = deque()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (work,))
    try:
        for block in blocks:
            waiting.append(pool.submit(_encode, block))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as fault:
        rule = "it was killed (out of memory?) or could not start; try a smaller data.workers"
        raise DataError(f"a process that builds the token store ended: {rule}") from fault
    finally:
        pool.shutdown(cancel_futures=True)


_work: Work


def _start_worker(work: Work) -> None:
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _encode(block: Block) -> Encoded:
    return encode_block(block, _work)
