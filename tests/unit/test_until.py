"""Done by 07:00: the next one, whatever is done to the clock meanwhile."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_tui.engine.until import Deadline, moment, read

DAY = 86_400.0


@pytest.fixture(autouse=True)
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A place that changes its clocks: on 2026-10-25 at 03:00 back by an hour, on 2026-03-29 at 02:00 forward."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def at(text: str) -> float:
    return datetime.strptime(text, "%Y-%m-%d %H:%M").timestamp()


class Clocks:
    """A wall clock that can be set and a steady one that cannot."""

    def __init__(self, wall: str) -> None:
        self.wall, self.steady = at(wall), 1000.0

    def deadline(self, text: str) -> Deadline:
        return Deadline(text, lambda: self.wall, lambda: self.steady)

    def go_on(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds


@given(st.integers(0, 23), st.integers(0, 59), st.floats(1.6e9, 2.2e9))
def test_a_time_of_day_is_the_next_one(hour: int, minute: int, now: float) -> None:
    due = moment(f"{hour:02}:{minute:02}", now)
    assert now < due <= now + DAY + 3600
    shown = datetime.fromtimestamp(due)
    assert (shown.hour, shown.minute) == (hour, minute) or shown.month == 3  # one hour of one night in March does not exist


@pytest.mark.parametrize(("now", "due"), [("2026-10-24 22:00", "2026-10-25 07:00"), ("2026-03-28 22:00", "2026-03-29 07:00")])
def test_a_night_with_a_change_of_clocks_ends_at_the_same_time_of_day(now: str, due: str) -> None:
    assert moment("07:00", at(now)) == at(due)
    assert at(due) - at(now) in (8 * 3600, 10 * 3600)


def test_a_date_is_what_it_is() -> None:
    assert moment("2026-11-28 07:00", at("2026-11-26 22:00")) == at("2026-11-28 07:00")


@pytest.mark.parametrize("text", ["7 o'clock", "25:00", "07:60", "", "2026-13-01 07:00", "07:00:00", "tomorrow"])
def test_anything_else_is_no_time(text: str) -> None:
    with pytest.raises(ValueError, match="^" + text + "$"):
        read(text)


def test_time_passes() -> None:
    clocks = Clocks("2026-11-26 22:00")
    deadline = clocks.deadline("07:00")
    assert deadline.left() == 9 * 3600
    clocks.go_on(8 * 3600)
    assert deadline.left() == 3600
    clocks.go_on(3601)
    assert deadline.left() == -1


def test_no_time_is_never() -> None:
    assert Clocks("2026-11-26 22:00").deadline("").left() == math.inf


@pytest.mark.parametrize("hours", [-30, -2, 2, 30])
def test_a_clock_that_is_set_gives_the_next_0700_of_the_new_time(hours: float) -> None:
    clocks = Clocks("2026-11-26 22:00")
    deadline = clocks.deadline("07:00")
    clocks.wall += hours * 3600
    due = clocks.wall + deadline.left()
    assert datetime.fromtimestamp(due).strftime("%H:%M") == "07:00"
    assert 0 < due - clocks.wall <= DAY
    assert (deadline.moved(), deadline.moved()) == (hours * 3600, 0.0)


def test_a_machine_that_slept_past_the_time_has_missed_it() -> None:
    clocks = Clocks("2026-11-26 22:00")
    deadline = clocks.deadline("07:00")
    clocks.go_on(10 * 3600)  # the steady clock goes on in sleep
    assert (deadline.left(), deadline.moved()) == (-3600, 0.0)


def test_a_clock_that_a_time_server_corrects_little_by_little_changes_nothing() -> None:
    clocks = Clocks("2026-11-26 22:00")
    deadline = clocks.deadline("2026-11-27 07:00")
    for _ in range(100):
        clocks.go_on(10)
        clocks.wall += 0.5
        deadline.left()
    assert (deadline.left(), deadline.moved()) == (9 * 3600 - 1000 - 50, 0.0)
