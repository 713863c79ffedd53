from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_tui.engine.pace import Pace, fit
from qlora_tui.engine.timetable import cadence, measurements, saves


def feed(pace, seconds, tokens=1000):
    for value in seconds:
        pace.feed(value, tokens)
    return pace


def middle(pace, steps, work):
    return pace.left(steps, work)[1]


def test_nothing_is_said_before_three_measured_steps():
    pace = feed(Pace(), [9.0, 1.0, 1.0])
    assert pace.left(97, 97_000) is None
    assert pace.step_seconds is None
    assert feed(pace, [1.0]).left(96, 96_000) is not None
    assert pace.step_seconds == 1.0


def test_a_slow_first_step_and_one_stall_do_not_move_it():
    pace = feed(Pace(), [60.0, *[2.0] * 30, 300.0, *[2.0] * 30])
    assert middle(pace, 100, 100_000) == pytest.approx(200.0, rel=0.02)
    assert "500 tokens/s" in pace.basis


def test_one_stall_widens_the_range_and_several_are_expected_again():
    quiet, once = feed(Pace(), [2.0] * 40), feed(Pace(), [*[2.0] * 20, 8.0, *[2.0] * 19])
    assert once.left(100, 100_000)[2] > quiet.left(100, 100_000)[2]
    often = feed(Pace(), [8.0 if number % 10 == 5 else 2.0 for number in range(64)])
    assert middle(often, 100, 100_000) == pytest.approx(260.0, rel=0.05)


def test_steps_of_different_length_are_judged_by_their_work():
    pace = Pace()
    for tokens in (500, 1500, 1000) * 10:
        pace.feed(tokens / 100, tokens)
    assert middle(pace, 10, 10_000) == pytest.approx(100.0)
    assert middle(pace, 10, 5_000) == pytest.approx(50.0)


def test_what_every_step_costs_is_told_from_what_grows_with_its_work():
    pace = Pace()
    for tokens in (500, 1500, 1000, 200) * 6:
        pace.feed(0.5 + tokens / 1000, tokens)
    assert middle(pace, 10, 2_000) == pytest.approx(7.0, rel=0.01)
    line = fit([(tokens, 0.5 + tokens / 1000) for tokens in (500, 1500, 1000, 200) * 3])
    assert (line.each, line.a_work) == pytest.approx((0.5, 0.001), rel=0.01)


def test_neither_part_of_the_line_is_below_zero():
    falling = fit([(tokens, 3000 - tokens) for tokens in range(500, 2500, 100)])
    assert falling.a_work == 0.0
    steep = fit([(tokens, tokens - 400) for tokens in range(500, 2500, 100)])
    assert steep.each == 0.0


def test_it_follows_a_change_of_speed_at_once_by_half_and_soon_wholly():
    assert middle(feed(Pace(), [1.0] * 60 + [2.0] * 8), 100, 100_000) == pytest.approx(150.0, rel=0.02)
    half = feed(Pace(), [1.0] * 60 + [2.0] * 8).left(100, 100_000)
    assert half[0] < 100 < 200 < half[2]
    assert middle(feed(Pace(), [1.0] * 60 + [2.0] * 16), 100, 100_000) == pytest.approx(200.0, rel=0.02)
    assert middle(feed(Pace(), [1.0] * 100 + [2.0] * 64), 100, 100_000) == pytest.approx(200.0)


def test_a_stall_of_one_step_is_no_change_of_speed():
    pace = feed(Pace(), [1.0] * 60 + [30.0] + [1.0] * 5)
    assert middle(pace, 100, 100_000) == pytest.approx(100.0, rel=0.02)


def test_nothing_left_takes_no_time():
    assert feed(Pace(), [1.0] * 10).left(0, 0.0) == (0.0, 0.0, 0.0)


def test_non_finite_and_empty_steps_do_not_count():
    pace = feed(Pace(), [1.0, float("nan"), 0.0, float("inf"), 1.0, 1.0])
    pace.feed(1.0, 0)
    assert pace.left(6, 6000) is None


@given(st.lists(st.tuples(st.floats(0.01, 100), st.integers(1, 10**6)), min_size=5, max_size=80), st.integers(1, 1000), st.floats(1, 1e6))
def test_the_range_holds_its_middle_whatever_is_fed(steps, remaining, work):
    pace = Pace()
    for seconds, tokens in steps:
        pace.feed(seconds, tokens)
    low, mid, high = pace.left(remaining, work * remaining)
    assert 0 <= low <= mid <= high


def test_more_steps_narrow_the_range():
    def width(steps):
        low, mid, high = feed(Pace(), [1.0, 1.2] * steps).left(100, 100_000)
        return (high - low) / mid

    assert width(30) < width(3)


def machine_of(seed, *, steps, warm, noise, stalls, throttled_from):
    """Tokens and seconds of each step of a made-up run: what every step costs, what grows with tokens, and what happens to machines."""
    source = random.Random(seed)
    each, rate = source.uniform(0.0, 0.3), source.uniform(1e-4, 1e-3)
    made = []
    for step in range(steps):
        tokens = source.randint(500, 4000)
        seconds = (each + rate * tokens) * max(0.5, source.gauss(1, noise))
        seconds *= 1 + warm * 2.0**-step  # kernels are chosen and caches filled
        seconds *= 1.25 if throttled_from is not None and step >= throttled_from else 1.0
        seconds += source.uniform(1, 3) * (each + rate * 2000) if stalls and step % stalls == 7 else 0.0
        made.append((tokens, seconds))
    return made


def forecast_at(made, at):
    """Return low, mid and high of the whole run as forecast after step `at`, and the truth."""
    pace = Pace()
    for tokens, seconds in made[:at]:
        pace.feed(seconds, tokens)
    gone, truth = sum(seconds for _, seconds in made[:at]), sum(seconds for _, seconds in made)
    left = pace.left(len(made) - at, sum(tokens for tokens, _ in made[at:]))
    return tuple(gone + part for part in left), truth


@given(seed=st.integers(0, 10**9), warm=st.floats(0, 8), noise=st.floats(0, 0.03), steps=st.integers(60, 400))
def test_at_step_20_a_steady_run_is_forecast_to_5_percent_whatever_its_warm_up(seed, warm, noise, steps):
    made = machine_of(seed, steps=steps, warm=warm, noise=noise, stalls=0, throttled_from=None)
    (low, mid, high), truth = forecast_at(made, 20)
    # the first step counts for nothing; the slow ones after it are few
    assert mid == pytest.approx(truth, rel=0.05)
    assert low <= truth <= high


@given(seed=st.integers(0, 10**9), throttled=st.integers(1, 30), noise=st.floats(0, 0.02))
def test_a_card_that_becomes_hot_is_followed_within_16_steps(seed, throttled, noise):
    made = machine_of(seed, steps=300, warm=2, noise=noise, stalls=0, throttled_from=throttled)
    (low, mid, high), truth = forecast_at(made, max(20, throttled + 17))
    assert mid == pytest.approx(truth, rel=0.05)
    assert low <= truth <= high


@pytest.mark.parametrize("stalls", [0, 9], ids=["steady", "every ninth step stalls"])
@pytest.mark.parametrize("noise", [0.02, 0.15, 0.4])
def test_the_range_holds_the_truth_nine_times_in_ten(noise, stalls):
    made = [machine_of(seed, steps=200, warm=4, noise=noise, stalls=stalls, throttled_from=None) for seed in range(200)]
    held = 0
    for run in made:
        (low, _, high), truth = forecast_at(run, 20)
        held += low <= truth <= high
    assert held >= 180


@given(total=st.integers(1, 300), step=st.integers(0, 300), evals=st.integers(0, 40), keep=st.integers(0, 40))
def test_the_timetable_counts_what_the_loop_does(total, step, evals, keep):
    step = min(step, total - 1)
    every, save = cadence(evals, total, 5), cadence(keep, total, 10)
    later = range(step + 1, total + 1)
    measured = [at for at in later if at % every == 0 and at < total]
    regular = {at for at in later if at % save == 0} | {total}
    assert measurements(step, total, every) == len(measured) + 1
    assert saves(step, total, save, every) == (len(regular), len(regular | set(measured)))
