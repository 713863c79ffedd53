"""The plot: finite whatever comes in, and never wider or higher than its room."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_tui.tui import plot
from qlora_tui.tui.history import History
from qlora_tui.tui.sight import Sight


def series(losses: list[float], **more) -> plot.Series:
    history = History()
    for number, loss in enumerate(losses, 1):
        history = history.add(number, loss)
    return plot.Series(history.buckets, **more)


def lines_of(text) -> list[str]:
    return text.plain.split("\n")


@given(
    st.lists(st.one_of(st.floats(-1e9, 1e9), st.just(math.nan), st.just(math.inf), st.just(-math.inf)), max_size=40),
    st.integers(1, 130),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_losses_in_any_room_are_drawn_within_it(losses, width, height, log_y, ascii_only):
    drawn = plot.draw(series(losses), width, height, plot.Look(log_y=log_y, ascii_only=ascii_only))
    assert len(lines_of(drawn)) <= height
    assert all(len(line) <= width for line in lines_of(drawn))
    assert not ascii_only or drawn.plain.isascii()


def test_a_step_that_is_not_finite_is_marked_and_bends_no_axis():
    clean, marked = [2.0 - i / 100 for i in range(60)], [2.0 - i / 100 for i in range(60)]
    marked[30] = math.nan
    first, second = plot.draw(series(clean), 60, 12), plot.draw(series(marked), 60, 12)
    assert "×" not in first.plain
    assert lines_of(second)[-3].count("×") == 1
    labels = [[line.split("┤")[0] if "┤" in line else "" for line in lines_of(drawn)] for drawn in (first, second)]
    assert labels[0] == labels[1]


def test_without_a_finite_loss_words_stand_in():
    assert "draws here" in plot.draw(series([]), 60, 10).plain
    assert "NaN" in plot.draw(series([math.nan, math.inf]), 60, 10).plain


def test_a_constant_series_gets_room_around_it():
    drawn = plot.draw(series([2.0, 2.0, 2.0]), 50, 9).plain
    assert "2.0┤" in drawn
    assert "2.2┤" in drawn


def test_losses_above_zero_have_no_negative_axis():
    assert "-" not in plot.draw(series([0.01, 0.9, 0.02]), 50, 10).plain


def test_measured_points_and_checkpoints_are_drawn():
    drawn = plot.draw(series([2.0] * 40, evals=[(0, 2.5), (20, 2.2)], marks={"saved": [20]}), 60, 12).plain
    assert drawn.count("◆") == 2
    assert drawn.count("▴") == 1


def test_a_spike_stays_visible_however_many_steps_share_a_column():
    losses = [1.0] * 3000
    losses[1500] = 3.0
    top = lines_of(plot.draw(series(losses), 60, 12, plot.Look(sight=Sight(everything=True))))[0]
    assert any(char not in " │┤.0123456789" for char in top)


def test_a_log_axis_skips_what_has_no_logarithm():
    assert plot.draw(series([0.0, 1.0, 2.0]), 50, 10, plot.Look(log_y=True)).plain
    assert plot.draw(series([100.0, 10.0, 1.0]), 50, 12, plot.Look(log_y=True)).plain.count("┤") >= 3


@pytest.mark.parametrize(("low", "high", "count"), [(0, 1, 4), (1.13, 2.24, 4), (0, 1125, 5), (1e-5, 3e-5, 3), (-2, 2, 4)])
def test_ticks_are_round_and_inside(low: float, high: float, count: int):
    ticks = plot.nice_ticks(low, high, count)
    assert 2 <= len(ticks) <= 2 * count + 2
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    steps = {round(b - a, 9) for a, b in itertools.pairwise(ticks)}
    assert len(steps) == 1


def test_a_clipped_step_is_marked_on_top_and_all_values_can_be_shown():
    losses = [2.0 - i / 200 for i in range(100)]
    losses[40] = 90.0
    clipped = plot.draw(series(losses), 60, 12)
    assert lines_of(clipped)[0].count("▲") == 1
    whole = plot.draw(series(losses), 60, 12, plot.Look(sight=Sight(everything=True)))
    assert "▲" not in whole.plain
    assert "100" in whole.plain
    assert lines_of(plot.draw(series(losses), 60, 12, plot.Look(ascii_only=True)))[0].count("^") == 1


def test_every_kind_of_mark_has_a_glyph_of_its_own():
    marks = {kind: [10 * at] for at, kind in enumerate(plot.GLYPHS, 1)}
    for column, ascii_only in ((0, False), (1, True)):
        drawn = plot.draw(series([2.0] * 100, marks=marks), 100, 12, plot.Look(ascii_only=ascii_only))
        axis = lines_of(drawn)[-2]
        places = [axis.index(glyphs[column]) for glyphs in plot.GLYPHS.values()]
        assert places == sorted(set(places))


def test_the_crosshair_is_seen_without_colour():
    for ascii_only, stroke in ((False, "│"), (True, "|")):
        plain = plot.draw(series([2.0] * 50), 60, 12, plot.Look(ascii_only=ascii_only)).plain
        crossed = plot.draw(series([2.0] * 50), 60, 12, plot.Look(ascii_only=ascii_only, sight=Sight(cross=25))).plain
        assert crossed.count(stroke) >= plain.count(stroke) + 7


def test_the_axis_counts_tokens_and_time():
    history = History()
    for number in range(1, 101):
        history = history.add(number, 2.0, 1e-4, 1.0, 50_000, number * 60.0)
    by_tokens = plot.draw(plot.Series(history.buckets), 80, 12, plot.Look(sight=Sight("tokens"))).plain
    by_time = plot.draw(plot.Series(history.buckets), 80, 12, plot.Look(sight=Sight("time"))).plain
    assert "2M" in by_tokens
    assert "4M" in by_tokens
    assert "1h" in by_time
    assert "30m" in by_time


def test_the_first_points_do_not_move_the_axis():
    feet = [lines_of(plot.draw(series([2.0] * steps), 60, 12))[-1] for steps in range(1, 21)]
    assert len(set(feet)) == 1


def test_a_closer_look_shows_only_its_steps():
    history = series([2.0] * 50 + [9.0] * 50).buckets
    near = plot.draw(plot.Series(history), 60, 12, plot.Look(sight=Sight(span=30, left=10, cross=20))).plain
    assert max(float(line.split("┤")[0]) for line in near.split("\n") if "┤" in line) < 3
    assert "20" in near.split("\n")[-1]
    assert "100" not in near.split("\n")[-1]


@given(st.lists(st.floats(0.1, 5), min_size=1, max_size=60), st.booleans(), st.integers(0, 3), st.sampled_from(["step", "tokens", "time"]))
@settings(max_examples=40, deadline=None)
def test_every_finite_step_leaves_a_dot_in_its_column(losses, ascii_only, weight, counts):
    history = History()
    for number, loss in enumerate(losses, 1):
        history = history.add(number, loss, 1e-4, 1.0, 10, number * 2.0)
    look = plot.Look(ascii_only=ascii_only, sight=Sight(counts, weight, everything=True))
    drawn = lines_of(plot.draw(plot.Series(history.buckets, last_step=len(losses)), 150, 14, look))
    axis = next(
        index for index, line in enumerate(drawn) if line.lstrip()[:1] in ("└", "+") and index > 1 and set(line[8:20]) <= set("─┬-+└")
    )
    margin = max(line.find("┤" if not ascii_only else "+") for line in drawn[:axis]) + 1
    filled = {column for line in drawn[:axis] for column, char in enumerate(line) if column >= margin and char not in " \u2800│|"}
    assert filled == set(range(min(filled), max(filled) + 1))  # one unbroken curve
    assert min(filled) <= margin + 8
