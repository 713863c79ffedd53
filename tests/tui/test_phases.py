"""Whatever happens to the terminal or the process, in whatever phase: the run survives or saves, and the shell gets its terminal back.

A training without a model stays in one phase until it is asked to stop, and writes on descriptors 1 and 2 from C meanwhile;
the same over the real engine is in test_signals_real and, from the first key to the adapter, in test_whole_wizard.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_run import PHASES
from pty_screen import PATIENCE, Terminal, assert_given_back, not_given_back

from qlora_tui.engine.events import Finished, Phase
from qlora_tui.engine.journal import EVENTS, is_running, leave_wish, read_records
from qlora_tui.engine.runs import list_runs

DRIVER = """
import runpy, sys
path = sys.argv[1]
sys.argv = sys.argv[1:]
runpy.run_path(path, run_name="__main__")
"""
HERE = Path(__file__).parents[1]
LEAKS = ("puts", "write-1", "write-2", "child", "child-err")


class Held:
    """A run on a terminal that stays in one phase."""

    def __init__(self, training: str, runs: Path, home: Path, *, controls: bool) -> None:
        self.runs = runs
        self.terminal = Terminal(
            DRIVER, str(HERE / "screen_driver.py"), training, str(runs), controls=controls, QLORA_TUI_HOME=str(home), PYTHONFAULTHANDLER="1"
        )

    @property
    def folder(self) -> Path:
        return list_runs(self.runs)[0].path

    def events(self) -> int:
        path = self.folder / EVENTS
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def until(self, holds: Callable[[], bool], *, reading: bool = True) -> None:
        deadline = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < deadline, (self.terminal.process.poll(), self.terminal.seen[-1500:])
            if reading and self.terminal.master >= 0:
                self.terminal._read()
            else:
                pace(self.terminal.process)

    def goes_on(self, more: int = 40, *, reading: bool = False) -> None:
        """Wait until the run has said `more` things."""
        before = self.events()
        self.until(lambda: self.events() > before + more, reading=reading)
        assert self.terminal.process.poll() is None
        assert is_running(self.folder)

    def has_leaked(self) -> bool:
        log = self.folder / "log.txt"
        return log.exists() and all(f"LEAK-{leak}" in log.read_text(errors="replace") for leak in LEAKS)

    def word(self) -> Finished:
        words = [record.event for record in read_records(self.folder / EVENTS) if isinstance(record.event, Finished)]
        assert len(words) == 1
        return words[0]


def pace(process: subprocess.Popen[bytes]) -> None:
    """Let a moment pass, or less where the process ends."""
    try:
        process.wait(0.02)
    except subprocess.TimeoutExpired:
        return


@pytest.fixture
def held(home: Path, tmp_path: Path) -> Iterator[Callable[..., Held]]:
    made: list[Held] = []

    def start(training: str, *, controls: bool = True) -> Held:
        made.append(Held(training, tmp_path / "runs", home, controls=controls))
        run = made[-1]
        run.until(lambda: bool(list_runs(run.runs)) and run.events() > 2)
        return run

    def in_phase(phase: str, *, controls: bool = True) -> Held:
        run = start(f"held_{phase}", controls=controls)
        run.until(lambda: run.has_leaked() and b"\x1b[?1049h" in run.terminal.seen and run.events() > 10)
        begun = {record.event.name for record in read_records(run.folder / EVENTS) if isinstance(record.event, Phase)}
        assert phase in begun
        return run

    in_phase.start = start  # type: ignore[attr-defined]  # the same without a phase
    yield in_phase
    for run in made:
        run.terminal.close()


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_gives_the_terminal_back(held: Callable[..., Held], phase: str, number: signal.Signals) -> None:
    run = held(phase)
    run.terminal.process.send_signal(number)
    assert run.terminal.wait() == 128 + number
    assert (run.word().outcome, run.word().reason, run.word().exit_code) == ("stopped", f"stop in {phase}", 128 + number)
    assert_given_back(run.terminal)


@pytest.mark.parametrize("phase", PHASES)
def test_ctrl_c_typed_saves_and_gives_the_terminal_back(held: Callable[..., Held], phase: str) -> None:
    run = held(phase)
    run.terminal.type(b"\x03")
    assert run.terminal.wait() == 130
    assert (run.word().outcome, run.word().exit_code) == ("stopped", 130)
    assert_given_back(run.terminal)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("signalled", [True, False], ids=["hang-up", "closed without a signal"])
def test_a_lost_terminal_ends_the_screen_and_never_the_run(held: Callable[..., Held], phase: str, signalled: bool) -> None:
    """The kernel sends SIGHUP to whose controlling terminal it was; to another it only says so on the next read or write."""
    run = held(phase, controls=signalled)
    run.terminal.hang_up(signalled=False)
    run.goes_on()
    run.terminal.process.terminate()
    assert run.terminal.wait() == 143
    assert (run.word().outcome, run.word().reason) == ("stopped", f"stop in {phase}")


@pytest.mark.parametrize("phase", PHASES)
def test_a_terminal_that_takes_nothing_does_not_hold_the_run_up(held: Callable[..., Held], phase: str) -> None:
    """Ctrl+S, a sleeping laptop: nobody reads what is drawn, the run goes on, and SIGTERM still ends it saved."""
    run = held(phase)
    run.goes_on(500)
    run.terminal.process.terminate()
    run.until(lambda: run.terminal.process.poll() is not None, reading=False)
    assert run.terminal.process.returncode == 143
    assert (run.word().outcome, run.word().reason) == ("stopped", f"stop in {phase}")
    run.terminal.wait()
    assert_given_back(run.terminal)


def test_a_terminal_that_wakes_up_again_is_drawn_on(held: Callable[..., Held]) -> None:
    run = held("train")
    run.goes_on(500)
    run.terminal.read_some(0.5)
    run.terminal.type(b"?")
    run.terminal.read_until(b"Keys")
    leave_wish(run.folder, "stop")
    run.until(lambda: not is_running(run.folder))
    run.terminal.type(b"\x1b")
    run.terminal.until_shown("Keys", gone=True)
    run.terminal.type(b"q")
    assert run.terminal.wait() == 130
    assert_given_back(run.terminal)


ENDS = {"three_steps": ("done", 0), "will_not_fit": ("will_not_fit", 3), "diverged": ("diverged", 4), "crashing": ("failed", 1)}


@pytest.mark.parametrize("training", ENDS)
def test_how_a_run_ended_is_the_exit_code_of_the_screen(held: Callable[..., Held], training: str) -> None:
    run = held.start(training)  # type: ignore[attr-defined]
    run.until(lambda: not is_running(run.folder) and b"\x1b[?1049h" in run.terminal.seen)
    run.terminal.read_some(0.6)
    run.terminal.type(b"q")
    assert run.terminal.wait() == ENDS[training][1]
    assert (run.word().outcome, run.word().exit_code) == ENDS[training]
    assert_given_back(run.terminal)


def test_what_is_not_given_back_would_be_seen() -> None:
    fine = b"\x1b[?1049h\x1b[?25l\x1b[>25u\x1b[22;0t\x1b[1;1Hx\x1b[<u\x1b[23;0t\x1b[?1049l\x1b[?25hbye"
    assert not_given_back(fine) == {}
    assert set(not_given_back(fine.replace(b"\x1b[?25h", b""))) == {"mode 25"}
    assert set(not_given_back(fine.replace(b"\x1b[?1049l", b""))) == {"mode 1049", "cells"}
    assert set(not_given_back(fine.replace(b"\x1b[<u", b""))) == {"keyboard"}
    assert set(not_given_back(fine.replace(b"\x1b[23;0t", b""))) == {"title"}
    assert set(not_given_back(fine + b"\x1b[3;4Hlate")) == {"cells"}
