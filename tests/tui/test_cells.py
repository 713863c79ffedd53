"""Small drawings: nothing wider than its room, nothing cut in half, and every cell that changed is sent."""

from __future__ import annotations

import doctest

from hypothesis import given
from hypothesis import strategies as st
from textual.content import Content

from qlora_tui.tui import words
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.base import changed

PIECE = st.tuples(st.text("ab 中é█░\n", max_size=6), st.sampled_from(["", "bold", "$error", "#5c6b80"]))
DRAWING = st.lists(PIECE, max_size=12).map(lambda parts: Content.assemble(*parts))


def grid(drawing: Content, width: int, height: int) -> list[list[object]]:
    """Return each cell as a terminal would show it: text up to there and the styles over it."""
    lines = drawing.split("\n", allow_blank=True)
    found: list[list[object]] = []
    for y in range(height):
        line = lines[y] if y < len(lines) else Content("")
        cells_of = [(char, [span.style for span in line.spans if span.start <= at < span.end]) for at, char in enumerate(line.plain)]
        whole = len(line.plain) != line.cell_length
        found.append([("", line.plain, line.spans)] * width if whole else (cells_of + [(" ", [])] * width)[:width])
    return found


@given(DRAWING, DRAWING, st.integers(1, 20))
def test_every_cell_that_differs_lies_in_a_part_that_is_sent(before, after, width):
    height = 1 + max(before.plain.count("\n"), after.plain.count("\n"))
    parts = changed(before, after, width)
    old, new = grid(before, width, height), grid(after, width, height)
    sent = {(x, part.y) for part in parts for x in range(part.x, part.right)}
    assert {(x, y) for y in range(height) for x in range(width) if old[y][x] != new[y][x]} <= sent
    assert all(part.x >= 0 and part.right <= width and part.height == 1 for part in parts)


def test_an_equal_drawing_sends_nothing():
    assert changed(Content("step 20\nloss 2.1"), Content("step 20\nloss 2.1"), 40) == []
    assert [tuple(part) for part in changed(Content("step 20\nloss 2.1"), Content("step 21\nloss 2.1"), 40)] == [(5, 0, 2, 1)]


@given(st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(float("nan"))), max_size=100), st.integers(0, 30))
def test_a_spark_is_no_wider_than_its_room_and_shows_all_values(values, width):
    drawn = cells.spark(values, width, low=0.0, high=100.0)
    assert len(drawn) == (min(width, len(values)))
    assert set(drawn) <= set("▁▂▃▄▅▆▇█ ")


def test_a_spike_and_the_ends_of_a_spark_are_where_they_belong():
    assert cells.spark([0, 0, 100, 100], 2) == "▁█"
    assert cells.spark([0, 50, 100], 3) == "▁▄█"


@given(st.lists(st.tuples(st.floats(0, 2000), st.one_of(st.none(), st.floats(0, 100))), max_size=60), st.integers(0, 40))
def test_a_timeline_fills_its_room_and_forgets_what_is_older(points, width):
    drawn = cells.timeline(points, width, 2000.0, low=0.0, high=100.0)
    assert len(drawn) == width
    recent = [value for t, value in points if value is not None and t > 1400]
    assert (drawn.strip() == "") == (not recent or not width)


def test_the_newest_value_of_a_timeline_is_at_its_right_end():
    assert cells.timeline([(1000.0, 100.0)], 10, 1000.0, low=0, high=100) == "         █"
    assert cells.timeline([(401.0, 0.0)], 10, 1000.0, low=0, high=100) == "▁         "


@given(st.lists(st.text("ab", min_size=1, max_size=9), max_size=12), st.integers(1, 40), st.integers(1, 4))
def test_figures_flow_in_whole_words(names, width, height):
    lines = cells.flow([[(name, "")] for name in names], width, height)
    assert len(lines) <= height
    assert all(line.cell_length <= width for line in lines)
    told = [word for line in lines for word in line.plain.split()]
    assert all(word in names for word in told)
    if sum(map(len, names)) + 2 * len(names) <= width:
        assert told == names


def test_examples_of_words_hold():
    assert doctest.testmod(words).failed == 0
