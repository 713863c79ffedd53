"""The run behind the screen: what ends the screen never ends the run, and two Ctrl+C end both."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.engine.events import Event, Finished, Stepped
from qlora_tui.engine.journal import EVENTS, Tail, is_running, leave_wish, read_records
from qlora_tui.engine.runs import list_runs

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0
CTRL_C = b"\x03"


class Terminal:
    """A driver process on a pseudo terminal whose output is always read."""

    def __init__(self, training: str, runs: Path, *more: str) -> None:
        self.runs = runs
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / ".pkg"), str(ROOT / "tests")]), "TERM": "xterm-256color"}
        command = [sys.executable, str(ROOT / "tests" / "screen_driver.py"), training, str(runs), *more]
        self.process = subprocess.Popen(command, env=environment, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
        os.close(slave)
        self.drawn = b""
        self.open = True
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        watched = select.poll()  # unlike select, it takes any descriptor, however many are open
        watched.register(self.master, select.POLLIN | select.POLLHUP)
        while self.open:
            if not watched.poll(50):
                continue
            try:
                block = os.read(self.master, 65536)
            except OSError:  # the other end is closed
                return
            with self._lock:
                self.drawn += block

    def until(self, seen: Callable[[], bool]) -> None:
        pace, deadline = threading.Event(), time.monotonic() + PATIENCE
        while not seen():
            assert time.monotonic() < deadline, (self.process.poll(), list_runs(self.runs), self.drawn[-2000:])
            pace.wait(0.02)

    def until_event(self, seen: Callable[[Event], bool]) -> Path:
        self.until(lambda: bool(list_runs(self.runs)))
        folder = list_runs(self.runs)[0].path
        tail = Tail(folder / EVENTS)
        self.until(lambda: any(seen(record.event) for record in tail.records()))
        return folder

    def shows(self, text: bytes) -> None:
        self.until(lambda: text in self.drawn)

    def press(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def hang_up(self) -> None:
        """Close the terminal, as a lost connection does."""
        self.open = False
        self._reader.join(PATIENCE)
        os.close(self.master)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE)
        if self.open:
            self.hang_up()


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[[str], Terminal]]:
    made: list[Terminal] = []

    def start(training: str, *more: str) -> Terminal:
        made.append(Terminal(training, tmp_path / "runs", *more))
        return made[-1]

    yield start
    for each in made:
        each.close()


def words(folder: Path) -> list[Any]:
    return [record.event for record in read_records(folder / EVENTS) if isinstance(record.event, Finished)]


def stepped(event: Event) -> bool:
    return isinstance(event, Stepped)


def test_ctrl_c_on_the_screen_stops_and_saves(terminal: Callable[[str], Terminal]) -> None:
    shown = terminal("until_asked")
    folder = shown.until_event(stepped)
    shown.shows(b"step ")
    shown.press(CTRL_C)
    shown.until_event(lambda event: isinstance(event, Finished))
    assert [word.outcome for word in words(folder)] == ["stopped"]
    shown.press(b"q")
    assert shown.process.wait(PATIENCE) == 130
    shown.shows(b"qlora-tui --resume")


def test_two_ctrl_c_end_a_run_that_hangs_and_give_the_terminal_back(terminal: Callable[[str], Terminal]) -> None:
    shown = terminal("deaf")
    folder = shown.until_event(stepped)
    shown.shows(b"step ")
    shown.press(CTRL_C)
    shown.until(lambda: (folder / "commands.jsonl").exists())
    shown.press(CTRL_C)
    assert shown.process.wait(PATIENCE) == 130
    assert [word.outcome for word in words(folder)] == ["aborted"]
    assert not is_running(folder)
    shown.until(lambda: b"\x1b[?1049l" in shown.drawn and b"\x1b[?25h" in shown.drawn)


def test_a_run_that_hangs_is_ended_where_asked_for_and_gives_the_terminal_back(terminal: Callable[..., Terminal]) -> None:
    shown = terminal("deaf", "--hang")
    folder = shown.until_event(stepped)
    assert shown.process.wait(PATIENCE) == 1
    assert [(word.outcome, "no sign of life" in word.reason) for word in words(folder)] == [("failed", True)]
    assert not is_running(folder)
    shown.until(lambda: b"\x1b[?1049l" in shown.drawn and b"\x1b[?25h" in shown.drawn)


def test_a_lost_terminal_ends_the_screen_and_not_the_run(terminal: Callable[[str], Terminal]) -> None:
    shown = terminal("until_asked")
    folder = shown.until_event(stepped)
    shown.shows(b"step ")
    shown.hang_up()
    before = list_runs(shown.runs)[0].step
    shown.until_event(lambda event: isinstance(event, Stepped) and event.step > before + 20)
    assert shown.process.poll() is None
    leave_wish(folder, "stop")
    assert shown.process.wait(PATIENCE) == 130
    assert [word.outcome for word in words(folder)] == ["stopped"]


def test_sigterm_under_the_screen_saves_and_exits_143(terminal: Callable[[str], Terminal]) -> None:
    shown = terminal("until_asked")
    folder = shown.until_event(stepped)
    shown.shows(b"step ")
    shown.process.send_signal(signal.SIGTERM)
    assert shown.process.wait(PATIENCE) == 143
    assert [word.outcome for word in words(folder)] == ["stopped"]
    shown.until(lambda: b"\x1b[?1049l" in shown.drawn)


def test_a_finished_run_is_left_with_its_summary_on_the_terminal(terminal: Callable[[str], Terminal]) -> None:
    shown = terminal("three_steps")
    shown.until_event(lambda event: isinstance(event, Finished))
    shown.shows(b"step ")
    shown.press(b"q")
    assert shown.process.wait(PATIENCE) == 0
    shown.shows(b"base 4.6000 -> tuned 2.8000")
