"""Blocks of documents to tokens, in several processes, in order.

This module is imported by every worker: it stays light (no torch, no pydantic).
"""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from subprocess import PIPE, Popen

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
        target: field or column that holds the target, for pairs of texts.
    """

    tokenizer: Tokenizer
    column: str
    heldout: float
    skip: bool
    target: str | None = None

    @property
    def sides(self) -> tuple[str, ...]:
        """Names of the stores that are written; document i of a side and of its targets belong together."""
        return ("train", "heldout") + (() if self.target is None else ("train.target", "heldout.target"))


@dataclass
class Side:
    """Documents of a block that go into one store: tokens as bytes of the store's dtype, and lengths."""

    stream: bytes
    lengths: npt.NDArray[np.int64]
    utf8_bytes: int


@dataclass
class Encoded:
    """A block, encoded: `sides` by the names of `Work.sides`; `cost` is bytes on disk."""

    sides: dict[str, Side]
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
    texts: dict[str, list[str]] = {name: [] for name in work.sides}
    skipped: list[Malformed] = []
    for item in read_documents(block, work.column, work.target):
        if isinstance(item, Document):
            side = "heldout" if is_heldout(item.name, work.heldout) else "train"
            texts[side].append(item.text)
            if item.target is not None:
                texts[f"{side}.target"].append(item.target)
        elif work.skip:
            skipped.append(item)
        else:
            rule = "mend it, or leave such lines out with data.on_error=skip"
            raise DataError(f"{item.where}: {item.reason}; {rule}")
    sides = {name: encode_side(of_side, work.tokenizer) for name, of_side in texts.items()}
    return Encoded(sides, block.cost, skipped)


def encode_side(texts: list[str], tokenizer: Tokenizer) -> Side:
    """Encode texts, each followed by the separator."""
    separator = np.array([tokenizer.separator], np.int32)
    documents = tokenizer.encode_batch(texts)
    pieces = [part for ids in documents for part in (ids, separator)]
    stream = np.concatenate(pieces).astype(dtype_of(tokenizer.vocab)).tobytes() if pieces else b""
    lengths = np.array([ids.size + 1 for ids in documents], np.int64)
    return Side(stream, lengths, sum(len(text.encode()) for text in texts))


def encode_blocks(blocks: Iterable[Block], work: Work, workers: int) -> Iterator[Encoded]:
    """Encode blocks, in the order in which they come, whatever the number of workers.

    At most a few blocks a worker are held at once.

    Raises:
        DataError: a line is malformed; a worker was killed.
    """
    if workers == 1:
        yield from (encode_block(block, work) for block in blocks)
        return
    processes = [Worker(work) for _ in range(workers - 1)]
    idle: SimpleQueue[Callable[[Block], Encoded]] = SimpleQueue()
    idle.put(lambda block: encode_block(block, work))  # this process works too: the libraries release the GIL
    for process in processes:
        idle.put(process.encode)

    def encode(block: Block) -> Encoded:
        encode_with_one = idle.get()
        try:
            return encode_with_one(block)
        finally:
            idle.put(encode_with_one)

    waiting: deque[Future[Encoded]] = deque()
    threads = ThreadPoolExecutor(workers)
    try:
        for block in blocks:
            waiting.append(threads.submit(encode, block))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.stop()
        threads.shutdown()


class Worker:
    """A Python process that encodes blocks, one at a time, over a pipe.

    `multiprocessing` is not used: its fork may hang once torch has started threads, and its other ways import
    the caller's main module again in each process, which may cost more than the work.
    """

    def __init__(self, work: Work) -> None:
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        environment = os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-c", f"from {__name__} import serve; serve()"]
        self._process = Popen(command, stdin=PIPE, stdout=PIPE, env=environment)
        self._work: Work | None = work

    def encode(self, block: Block) -> Encoded:
        assert self._process.stdin
        assert self._process.stdout
        try:
            if self._work is not None:
                pickle.dump(self._work, self._process.stdin)
                self._work = None
            pickle.dump(block, self._process.stdin)
            self._process.stdin.flush()
            answer = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as fault:
            rule = "it was killed (out of memory?) or could not start; try a smaller data.workers"
            ended = f"a process that builds the token store ended with status {self._process.wait()}"
            raise DataError(f"{ended}: {rule}") from fault
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


def serve() -> None:
    """Encode what comes on standard input until it ends, as it does when the parent stops or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    requests = sys.stdin.buffer
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # what a library prints must not get among the answers
        work = pickle.load(requests)
        while True:
            try:
                block = pickle.load(requests)
            except EOFError:
                return
            try:
                answer: Encoded | Exception = encode_block(block, work)
            except Exception as fault:
                answer = fault
            pickle.dump(answer, answers)
            answers.flush()
