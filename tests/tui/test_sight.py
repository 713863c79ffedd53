"""Zoom, crosshair, axis and smoothing: arithmetic that must never leave the run."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_tui.tui.history import WEIGHTS, History
from qlora_tui.tui.sight import CLOSEST, COUNTS, Scale, Sight


def buckets(steps: int, *, tokens: int = 10, seconds: float = 0.5):
    history = History()
    for number in range(1, steps + 1):
        history = history.add(number, 2.0, 1e-4, 1.0, tokens, number * seconds)
    return history.buckets


KEYS = st.lists(st.sampled_from(["left", "right", "far left", "far right", "in", "out", "all"]), max_size=40)


@given(st.integers(1, 300), st.integers(0, 700), KEYS)
def test_whatever_is_pressed_the_crosshair_stays_on_a_step_in_sight(steps, horizon, keys):
    shown, sight = buckets(steps), Sight()
    for key in keys:
        ends = sight.edges(1, steps, horizon)
        by = {"left": -1, "right": 1, "far left": -10, "far right": 10}.get(key)
        if by is not None:
            sight = sight.moved(by, shown, ends, 70)
        else:
            factor = {"in": 0.5, "out": 2.0, "all": 0.0}[key]
            sight = sight.zoomed(factor, 1, steps, horizon) if factor else sight.whole()
        left, right = sight.edges(1, steps, horizon)
        assert left < right
        if sight.cross is not None:
            assert 1 <= sight.cross <= steps
            assert left <= sight.cross <= right
    assert sight.span == 0 or CLOSEST <= sight.span <= max(steps, CLOSEST + 1)


@given(st.integers(2, 200))
def test_one_key_moves_the_crosshair_by_one_step_where_there_is_room_for_all(steps):
    shown, sight = buckets(steps), Sight()
    ends = sight.edges(1, steps, steps)
    sight = sight.moved(-1, shown, ends, 1000)
    assert sight.cross == steps
    assert sight.moved(-1, shown, ends, 1000).cross == steps - 1
    assert sight.moved(1, shown, ends, 1000).cross == steps


def test_a_closer_look_keeps_the_crosshair_where_it_is_on_screen():
    shown, sight = buckets(1000), Sight()
    sight = sight.moved(-1, shown, (1, 1000), 100)
    for _ in range(50):
        sight = sight.moved(-1, shown, sight.edges(1, 1000, 1000), 100)
    share = sight.cross / 1000
    near = sight.zoomed(0.5, 1, 1000, 1000)
    left, right = near.edges(1, 1000, 1000)
    assert (near.cross - left) / (right - left) == pytest.approx(share, abs=0.02)
    assert right - left == pytest.approx(500, abs=2)


def test_without_a_crosshair_the_newest_steps_are_followed():
    near = Sight().zoomed(0.5, 1, 1000, 1000)
    assert near.edges(1, 1000, 1000)[1] == 1000
    assert near.edges(1, 1200, 1200)[1] == 1200


def test_twenty_steps_fit_before_the_axis_moves():
    assert {Sight().edges(1, last, 0) for last in range(1, 21)} == {(1, 21)}


def test_smoothings_and_axes_go_round():
    sight, weights, counts = Sight(), [], []
    for _ in range(4):
        sight = sight.next_weight()
        weights.append(sight.smoothing)
    for _ in range(3):
        sight = sight.next_counts()
        counts.append(sight.counts)
    assert sorted(weights) == sorted(WEIGHTS)
    assert sorted(counts) == sorted(COUNTS)


@given(st.integers(1, 5000), st.sampled_from(COUNTS), st.integers(1, 9), st.floats(0.01, 100))
def test_a_later_step_never_lies_further_left(steps, counts, tokens, seconds):
    scale = Scale(counts, buckets(steps, tokens=tokens, seconds=seconds))
    steps_asked = sorted((0, 1, steps / 3, steps / 2, steps - 1, steps, steps + 1, 2 * steps))
    places = [scale.at(step) for step in steps_asked]
    assert all(x <= y + 1e-6 * max(1.0, abs(y)) for x, y in itertools.pairwise(places))
    each = {"step": 1.0, "tokens": tokens, "time": seconds}[counts]
    assert scale.at(steps) == pytest.approx(steps * each)


def test_a_run_without_tokens_or_times_is_counted_in_steps():
    assert Scale("tokens", buckets(10, tokens=0)).counts == "step"
    assert Scale("time", ()).at(3) == 3


@given(st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan), st.just(math.inf)), min_size=1, max_size=80))
def test_every_smoothing_is_the_corrected_mean_of_the_finite_losses(losses):
    history = History()
    for number, loss in enumerate(losses, 1):
        history = history.add(number, loss)
    finite = [loss for loss in losses if math.isfinite(loss)]
    for weight, seen in zip(WEIGHTS, history.buckets[-1].smooth, strict=True):
        shares = [(1 - weight) * weight**age for age in range(len(finite))]
        expected = sum(share * loss for share, loss in zip(shares, reversed(finite), strict=True)) / sum(shares) if finite else math.nan
        assert seen == pytest.approx(expected, abs=1e-6, nan_ok=True)
