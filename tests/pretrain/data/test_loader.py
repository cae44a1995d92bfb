"""The loader: the stream's batches, ahead of time, with a cursor that counts what was handed out."""

import threading

import numpy as np
import pytest
import torch

from headway.pretrain.config import Train
from headway.pretrain.data.loader import Loader
from headway.pretrain.data.ramp import BatchSizes
from headway.pretrain.data.stream import SampleStream
from headway.pretrain.data.token_rows import TokenRows
from headway.pretrain.errors import DataError


class CountingStore:
    """One document whose tokens are 1, 2, 3, ...: a token tells its place."""

    tokens = 101

    def read(self, start, count):
        return np.arange(start + 1, start + count + 1, dtype=np.uint16)

    def boundaries(self, start, stop):
        return np.zeros(0, dtype=np.int64)


def stream(**options):
    return SampleStream([("a", TokenRows(CountingStore(), 10, 0, **options), 1.0)], 0)


def batches_of(rows):
    return BatchSizes(Train(global_batch=rows))


def collate(rows):
    tokens = torch.from_numpy(rows["tokens"])
    return {"inputs": tokens[:, :-1], "labels": tokens[:, 1:]}


def take(loader, n):
    return [next(loader) for _ in range(n)]


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
def test_batches_are_the_streams_in_order(ahead):
    with Loader(stream(), collate, batches_of(4), ahead=ahead) as loader:
        for step, batch in enumerate(take(loader, 6)):
            expected = stream().rows(np.arange(4 * step, 4 * step + 4))
            assert torch.equal(batch["inputs"], torch.from_numpy(expected["tokens"][:, :-1]))
            assert batch["sample"].tolist() == list(range(4 * step, 4 * step + 4))
            assert batch["slot"].tolist() == [0, 1, 2, 3]
            assert batch["sample"].dtype == batch["slot"].dtype == torch.int64
    assert not loader_threads()


def test_ranks_together_hold_the_global_batch():
    loaders = [Loader(stream(), collate, batches_of(6), rank, 3) for rank in range(3)]
    whole = Loader(stream(), collate, batches_of(6))
    for _ in range(3):
        parts, batch = [next(loader) for loader in loaders], next(whole)
        for key, tensor in batch.items():
            assert torch.equal(torch.cat([part[key] for part in parts]), tensor)
    for loader in [*loaders, whole]:
        loader.close()


def test_the_saved_cursor_counts_batches_that_were_handed_out():
    with Loader(stream(), collate, batches_of(4), ahead=3) as loader:
        assert loader.state()["draw"] == 0
        take(loader, 2)
        state = loader.state()
        assert state["draw"] == 8
        following = take(loader, 3)
    with Loader(stream(), collate, batches_of(4)) as resumed:
        assert resumed.load(state) == []
        for a, b in zip(take(resumed, 3), following, strict=True):
            assert all(torch.equal(a[key], b[key]) for key in b)


def test_load_drops_prepared_batches():
    with Loader(stream(), collate, batches_of(4)) as loader:
        state = loader.state()
        first = next(loader)
        take(loader, 2)
        loader.load(state)
        assert torch.equal(next(loader)["sample"], first["sample"])


def test_the_next_batches_are_made_while_the_consumer_works():
    made, third = [], threading.Event()

    def watch(rows):
        made.append(int(rows["sample"][0]))
        if len(made) == 3:
            third.set()
        return collate(rows)

    with Loader(stream(), watch, batches_of(4), ahead=2) as loader:
        next(loader)
        assert third.wait(timeout=60)  # two more were made though none was asked for
        assert made[:3] == [0, 4, 8]


def test_an_error_surfaces_in_its_place_and_the_cursor_stays_before_it():
    def fails_at_8(rows):
        if rows["sample"][0] == 8:
            raise DataError("row 8 is bad")
        return collate(rows)

    loader = Loader(stream(), fails_at_8, batches_of(4))
    take(loader, 2)
    for _ in range(2):  # asking again does not step over it
        with pytest.raises(DataError, match="row 8 is bad"):
            next(loader)
        assert loader.state()["draw"] == 8
    assert not loader_threads()


def test_an_error_of_the_stream_surfaces_too():
    with (
        Loader(stream(vocab=3), collate, batches_of(10)) as loader,
        pytest.raises(DataError, match="vocabulary of 3"),
    ):
        next(loader)


def test_closing_twice_or_unused_is_fine():
    loader = Loader(stream(), collate, batches_of(4))
    loader.close()
    next(loader)
    loader.close()
    loader.close()
    assert loader.state()["draw"] == 4
    assert not loader_threads()
