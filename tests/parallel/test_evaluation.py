"""Held-out rows that ranks cannot share evenly: each is counted once, beside one process and beside Accelerate.

Rounds are filled up with rows in which nothing is scored (`pretrain/evaluate.py`), so that sums and counts need no
correction. Accelerate fills up with rows of the beginning, and `gather_for_metrics` cuts them off again.
"""

import os
from unittest import mock

import numpy as np
import pytest
import torch

from headway.pretrain.evaluate import Evaluator, heldout_rows
from headway.tests.parallel.proof import Running

NAMES = ["gpt", "bert", "ul2", "vit", "deit", "mae", "experts", "spectral"]
ROW_BY_ROW = ["gpt", "bert", "ul2", "vit", "mae"]
"""Those whose metrics are sums over rows; of experts the balance of a whole batch is one."""
ROWS_A_ROUND = 2
TAILS = [1, 4, 7]
"""Held-out rows. Of 7, two ranks score 4 and then 2 and 1; three ranks 6 and then 1, 0 and 0."""


def held_out(rank, world, parallel, names):
    """(name, rows) -> sums and counts of the evaluator."""
    found = {}
    for name in names:
        running = Running(name, rank, world, parallel)
        place = torch.device("cpu"), running.here.data_rank, running.here.layout.data
        evaluator = Evaluator(
            running.engine,
            running.stream.samples,
            running.objective.collate,
            *place,
            rows_per_round=ROWS_A_ROUND,
        )
        for rows in TAILS:
            found[name, rows] = evaluator.sums(rows)
    return found


@pytest.fixture(scope="module")
def expected():
    """Of one process, whose last round is uneven too."""
    return held_out(0, 1, {}, NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.matrix)])
def test_every_metric_counts_every_row_once(pool, expected, ranks):
    for found in pool(held_out, ranks=ranks, parallel={"shard": ranks}, names=NAMES):
        assert found.keys() == expected.keys()
        for case, sums in expected.items():
            assert found[case].keys() == sums.keys(), case
            for metric, (total, count) in sums.items():
                assert found[case][metric][1] == count, (case, metric)  # counts are whole numbers: exact
                # fp64 sums of some hundred terms in another order
                assert found[case][metric][0] == pytest.approx(total, rel=1e-11, abs=1e-12), (case, metric)


def row_by_row(name, rows):
    """Sums and counts of each row alone [rows, metrics, 2], and the metrics' names."""
    running = Running(name, 0, 1, {})
    (samples,) = running.stream.samples
    table, names = [], None
    for i in np.linspace(0, len(samples) - 1, rows).astype(np.int64):
        one = heldout_rows(samples, np.array([i])) | {"scored": np.ones(1, dtype=bool)}
        sums = running.engine.evaluate(running.objective.collate(one))
        names = names or list(sums)
        table.append([sums[metric] for metric in names])
    return np.array(table, dtype=np.float64), names


def gathered(rank, world, tables):
    """Sums over rows by Accelerate: with its tail cut off, and with all that it gathers."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    ranks = {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
    }  # fmt: skip
    found = {}
    with mock.patch.dict(os.environ, ranks):
        try:
            accelerator = Accelerator(cpu=True)
            assert (accelerator.process_index, accelerator.num_processes) == (rank, world)
            for name, table in tables.items():
                loader = torch.utils.data.DataLoader(torch.from_numpy(table), batch_size=ROWS_A_ROUND)
                kept, padded = 0, 0
                for rows in accelerator.prepare(loader):
                    kept = kept + accelerator.gather_for_metrics(rows).sum(0)
                    padded = padded + accelerator.gather(rows).sum(0)
                found[name] = kept.numpy(), padded.numpy()
        finally:
            AcceleratorState._reset_state(True)
            GradientState._reset_state()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.matrix)])
def test_sums_are_those_of_gather_for_metrics(pool, ranks):
    rows = TAILS[-1]
    tables = {name: row_by_row(name, rows) for name in ROW_BY_ROW}
    theirs = pool(gathered, ranks=ranks, tables={name: table for name, (table, _) in tables.items()})
    ours = pool(held_out, ranks=ranks, parallel={"shard": ranks}, names=ROW_BY_ROW)
    for rank in range(ranks):
        for name, (_, metrics) in tables.items():
            sums, (kept, padded) = ours[rank][name, rows], theirs[rank][name]
            assert sums.keys() == set(metrics), name
            for metric, (total, count), (_, more) in zip(metrics, kept, padded, strict=True):
                assert sums[metric][1] == count, (name, metric)
                assert sums[metric][0] == pytest.approx(total, rel=1e-11, abs=1e-12), (name, metric)
                assert sums[metric][0] / max(count, 1) == pytest.approx(
                    total / max(count, 1), rel=1e-11, abs=1e-12
                )
                assert more > count, (name, metric)  # without the cut some rows count twice
