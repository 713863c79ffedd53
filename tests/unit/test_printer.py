"""What a person reads of a run without a screen, and in its report."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_tui.engine import report
from qlora_tui.engine.events import Command, Event, Finding, Finished, Phase, Prepared, Record, Sampled
from qlora_tui.tui.printer import Printer, Streams

NOTE = "The template knows no system turn: it was put before the first user turn.\x1b[2J"
PREPARED = Prepared("messages", "why", 10, 8, 2, 100, 60, 2, 4, notes=(NOTE,))


def printed(capsys: pytest.CaptureFixture[str], *events: Event) -> str:
    printer = Printer(Streams(), Path("runs/a-run"))
    for number, event in enumerate(events, 1):
        printer.show(Record(1, number, float(number), event))
    return capsys.readouterr().out


def test_what_was_done_to_the_data_is_said_in_lines_and_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = printed(capsys, PREPARED)
    assert "note: The template knows no system turn" in out
    told = report.render(report.see([Record(1, 1, 1.0, PREPARED)]), tmp_path)
    assert "- note: The template knows no system turn" in told
    assert "\x1b" not in out + told


def test_work_that_cannot_be_counted_is_still_named(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, Phase("fetch", "begin"), Phase("fetch", "progress", note="converting it"), Phase("fetch", "progress"))
    assert out.splitlines() == ["fetching the model ...", "fetching the model: converting it ..."]


def test_the_outcome_is_not_said_twice(capsys: pytest.CaptureFixture[str]) -> None:
    assert "\nstopped before the first step" in printed(capsys, Finished("stopped", 130, "stopped before the first step"))
    assert "\nfailed: no row is left" in printed(capsys, Finished("failed", 2, "no row is left"))


def test_both_reports_are_named_where_both_are_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/a-run")
    folder.mkdir(parents=True)
    done = Finished("done", 0, "all steps", report="report.md")
    assert "report:  runs/a-run/report.md\n" in printed(capsys, done)
    (folder / "report.html").touch()
    assert "report:  runs/a-run/report.md, and report.html\n" in printed(capsys, done)
    for odd in (".", "..", "x" * 5000, "a\0b"):
        assert "report:" in printed(capsys, Finished("done", 0, "all steps", report=odd))


def test_a_pause_a_sample_and_a_changed_rate_are_told_without_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(
        capsys,
        Command("1", "pause", obeyed=True),
        Phase("pause", "begin", note="as asked"),
        Finding("pause", "info", 3, "paused: 5.0 GiB of the device are free"),
        Phase("pause", "end", seconds=130.0),
        Command("2", "set", True, "from step 4 on the learning rate is 0.5 times the planned one", 4, {}),
        Command("3", "sample", obeyed=False, why="no rows are held out"),
        Sampled(3, "say\n\x1b[2J 3", "abc \x1b]0;x\x07"),
        Sampled(3, "say 4", ""),
    )
    assert out.splitlines() == [
        "pause: asked for",
        "paused: as asked ...",
        "note at step 3: paused: 5.0 GiB of the device are free.",
        "paused: done  2 min",
        "set: asked for, from step 4 on the learning rate is 0.5 times the planned one",
        "sample: refused, no rows are held out",
        "sample after step 3: say \\x1b[2J 3 -> abc \\x1b]0;x\\x07",
        "sample after step 3: say 4 -> (nothing)",
    ]
