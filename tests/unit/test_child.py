"""A child process: what it said, how it is stopped, and that it never waits for an answer."""

from __future__ import annotations

import sys

import pytest

from qlora_tui.engine import child
from qlora_tui.engine.errors import Stopped

STUBBORN = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(child, "GRACE_SECONDS", 0.01)


def test_both_streams_and_the_code_are_kept() -> None:
    ended = child.run(python("import sys; print('out'); sys.stderr.write('err'); sys.exit(7)"), doing="testing")
    assert ended.code == 7
    assert "out" in ended.talk
    assert "err" in ended.talk


def test_its_environment_is_ours_with_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "kept")
    ended = child.run(python("import os; print(os.environ['KEPT'], os.environ['ADDED'])"), doing="testing", env={"ADDED": "added"})
    assert ended.talk.strip() == "kept added"


def test_it_reads_nothing() -> None:
    assert child.run(python("import sys; print(repr(sys.stdin.read()))"), doing="testing").talk.strip() == "''"


@pytest.mark.parametrize(
    ("talk", "words"),
    [
        ("fine\nERROR: no index\nmore\n", "ERROR: no index"),
        ("only this\n\n", "only this"),
        ("", "it ended with code 5 and said nothing"),
        ("error \x1b]0;title\x07", "error \\x1b]0;title\\x07"),
    ],
)
def test_its_last_words_say_why_and_are_safe_to_show(talk: str, words: str) -> None:
    assert child.Ended(5, talk).last_words == words


def test_a_wish_to_stop_ends_even_a_stubborn_one() -> None:
    looks = iter([False, False, True])
    with pytest.raises(Stopped, match="stopped while testing; nothing half-made was kept"):
        child.run(python(STUBBORN), doing="testing", stopping=lambda: next(looks))


def test_a_time_limit_ends_it_and_shows_in_the_code() -> None:
    assert child.run(python(STUBBORN), doing="testing", seconds=0.05).code < 0


def test_it_is_watched_while_it_works() -> None:
    seen: list[int] = []
    child.run(python(STUBBORN), doing="testing", seconds=0.05, watch=lambda: seen.append(1))
    assert len(seen) >= 3
