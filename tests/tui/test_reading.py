"""A long reading on the command line: a bar that goes away on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import io

import pytest

from qlora_tui.tui import reading
from qlora_tui.tui.printer import Output
from qlora_tui.tui.reading import Reading, on_a_line


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(reading.time, "monotonic", lambda: now[0])
    return now


def test_a_terminal_shows_a_bar_and_is_clean_afterwards(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    screen = Screen()
    with on_a_line(Output(screen)) as told:
        told.progress(1, 4)
        assert screen.getvalue() == ""  # what is over in a moment needs no bar
        clock[0] += 1
        told.progress(2**30, 4 * 2**30)
        clock[0] += 1
        told.rows("comparing the rows", 1500, 3000)
    first, second, last, end = screen.getvalue().split("\r")[1:]
    assert first.strip() == "[######                  ] reading the data 25 % of 4.0 GiB"[:59].strip()
    assert second.strip() == "[############            ] comparing the rows 1,500 of 3,000 rows"[:59].strip()
    assert {len(first), len(second), len(last)} == {59}
    assert not last.strip()
    assert end == ""
    assert "\x1b" not in screen.getvalue()


def test_a_log_gets_a_line_every_ten_seconds(clock: list[float]) -> None:
    log = io.StringIO()
    with on_a_line(Output(log)) as told:
        for second in range(25):
            clock[0] = 100.0 + second
            told.progress(second, 100)
    assert log.getvalue().splitlines() == ["reading the data  10 % of 1 KiB", "reading the data  20 % of 1 KiB"]


def test_what_nobody_knows_the_size_of_is_told_without_a_share() -> None:
    told: list[tuple[float | None, str]] = []
    hub = Reading(lambda share, text: told.append((share, text)))
    hub.progress(0, 0)
    hub.progress(5, 5)
    assert told == [(None, "reading the data …"), (1.0, "checking the run …")]
    hub.stopping()
