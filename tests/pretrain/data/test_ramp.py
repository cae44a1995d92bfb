"""The growing batch against Megatron-LM's calculator, and its functions against each other."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.pretrain.config import Ramp, Train
from headway.pretrain.data.ramp import BatchSizes, Stage


def sizes(start, increment, growths, samples):
    ramp = Ramp(start=start, increment=increment, samples=samples)
    return BatchSizes(Train(global_batch=start + growths * increment, ramp=ramp))


ramps = st.builds(sizes, st.integers(1, 40), st.integers(1, 17), st.integers(0, 12), st.integers(1, 3000))


@settings(max_examples=200, deadline=None)
@given(ramps)
def test_steps_have_megatrons_sizes(batch):
    calculators = pytest.importorskip("megatron.core.num_microbatches_calculator")
    train = batch.train
    shares = (train.global_batch - train.ramp.start) // train.ramp.increment
    if not shares:
        return  # theirs divides by it
    theirs = calculators.RampupBatchsizeNumMicroBatchesCalculator(
        train.global_batch, 1, 1, False, 1, train.ramp.start, train.ramp.increment, train.ramp.samples
    )
    consumed = 0
    for step in range(batch.stages[-1].step + 3):
        theirs.update(consumed, consistency_check=False)
        # Their share is a float: exactly at the end of one, its rounding decides; ours is exact.
        edge = consumed * shares % train.ramp.samples == 0
        if not (edge and Fraction(theirs.rampup_samples_per_increment) * shares != train.ramp.samples):
            assert batch.rows(step) == theirs.get_current_global_batch_size()
        consumed += batch.rows(step)


@settings(max_examples=200, deadline=None)
@given(ramps)
def test_a_step_has_the_size_of_the_share_in_which_it_begins(batch):
    train = batch.train
    shares = (train.global_batch - train.ramp.start) // train.ramp.increment
    drawn = 0
    for step in range(batch.stages[-1].step + 3):
        grown = min(shares, drawn * shares // train.ramp.samples)
        assert batch.first(step) == drawn
        assert batch.rows(step) == train.ramp.start + grown * train.ramp.increment
        drawn += batch.rows(step)


@settings(max_examples=200, deadline=None)
@given(ramps, st.integers(0, 10**12))
def test_step_of_inverts_first(batch, number):
    step = batch.step_of(number)
    assert batch.first(step) <= number < batch.first(step + 1)
    assert batch.step_of(batch.first(number)) == number
    assert batch.first(number + 1) - batch.first(number) == batch.rows(number)


def test_without_a_ramp_all_steps_are_alike():
    batch = BatchSizes(Train(global_batch=24))
    assert batch.stages == (Stage(0, 0, 24),)
    assert [batch.rows(s) for s in (0, 10**9)] == [24, 24]
    assert (batch.first(7), batch.step_of(7 * 24), batch.step_of(7 * 24 - 1)) == (168, 7, 6)


def test_gpt_3s_ramp():
    """Brown et al. 2020 grow the batch over the first billions of tokens; in rows, as Megatron-LM's recipe says it."""
    batch = sizes(32, 32, 47, 375_000)
    assert batch.train.global_batch == 1536
    assert batch.stages[0] == Stage(0, 0, 32)
    assert len(batch.stages) == 48
    last = batch.stages[-1]
    assert last.rows == 1536
    assert 375_000 <= last.draw < 375_000 + 1536


def test_sizes_whose_share_is_used_up_are_left_out():
    assert sizes(4, 2, 3, 3).stages == (Stage(0, 0, 4), Stage(1, 4, 10))
