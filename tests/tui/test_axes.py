"""Axes: round numbers, room around a constant, and no outlier that flattens the rest."""

from __future__ import annotations

import doctest
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_tui.tui import axes

LOSSES = st.lists(st.floats(0, 1e6).filter(lambda loss: loss == 0 or loss > 1e-12), min_size=1, max_size=120)


def test_examples_hold():
    assert doctest.testmod(axes).failed == 0


@given(LOSSES, st.integers(2, 6), st.booleans())
def test_an_axis_holds_its_values_and_never_goes_below_what_cannot_be_negative(losses, count, log):
    low, high = min(losses), max(losses)
    bottom, top = axes.padded(low, high, count, log=log and low > 0)
    assert 0 <= bottom <= low + 1e-6 * (top - bottom)
    assert high <= top + 1e-6 * (top - bottom)
    assert bottom < top
    assert not (log and low > 0) or bottom > 0
    ticks = axes.nice_ticks(bottom, top, count)
    assert all(bottom - 1e-6 * top <= tick <= top * (1 + 1e-6) for tick in ticks)
    assert len(set(axes.labels(ticks))) == len(ticks) or top - bottom < 0.02 * top


@given(LOSSES)
def test_the_usual_range_lies_within_the_whole_one(losses):
    low, high = axes.usual_range(losses, losses)
    assert min(losses) <= low <= high <= max(losses)
    assert axes.usual_range(losses, losses, everything=True) == (min(losses), max(losses))


def test_a_spike_is_cut_off_and_an_ordinary_start_is_not():
    falling = [4.0 - 2.5 * min(1.0, at / 60) for at in range(300)]
    assert axes.usual_range(falling, falling) == (1.5, 4.0)
    spiked = [*falling[:200], 900.0, *falling[200:]]
    assert axes.usual_range(spiked, spiked)[1] < 6
    low = [*falling[:200], -50.0, *falling[200:]]
    assert axes.usual_range(low, low)[0] > 0


@pytest.mark.parametrize(("low", "high"), [(0, 5), (0, 200), (0, 5400), (3600, 90_000), (0, 4_000_000), (0, 4e7)])
def test_time_ticks_are_whole_and_few(low, high):
    ticks = axes.time_ticks(low, high, 5)
    assert 1 <= len(ticks) <= 7
    assert all(low <= tick <= high for tick in ticks)
    assert len({b - a for a, b in itertools.pairwise(ticks)}) <= 1
    words = [axes.passed(tick) for tick in ticks]
    assert len(set(words)) == len(words)
    assert max(map(len, words)) <= 5
