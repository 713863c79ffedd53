"""What takes its time on the last page: the test run, and the check before the start with the start itself.

Each works on a thread, so that the screen stays free; what it says and how it ended are shown on the page. Nothing
that was chosen is lost, whatever goes wrong.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tui.engine.errors import EngineError, Problem, Stopped
from qlora_tui.engine.rules import problems
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.text import one_line, without_secrets
from qlora_tui.tui.probe import probe_lines
from qlora_tui.tui.reading import Reading
from qlora_tui.tui.screens.go import begun

if TYPE_CHECKING:
    from qlora_tui.tui.screens.wizard import WizardScreen

PROBE_ROWS = 50
"""Rows of a test run: enough for a figure within a few percent, few enough to wait for."""


def enqueue(run: RunConfig, name: str, reading: Reading) -> int:
    """Check `run` and put it into the queue; return its number there.

    Raises:
        EngineError: the run cannot be.
    """
    from qlora_tui.tui.commands import queue  # the command's own way; for the few who press the key
    from qlora_tui.tui.commands.run import Plan

    return queue.enqueue(Plan(run, name), reading).id


class TestRun:
    """Trains on a few rows and keeps nothing, to measure how fast this machine is."""

    def __init__(self, wizard: WizardScreen) -> None:
        """Work for `wizard`, which shows what is found."""
        self._wizard = wizard
        self._stop = threading.Event()
        self.running = False

    def begin(self) -> None:
        """Make the test run, or end the one under way."""
        wizard = self._wizard
        if self.running:
            self._stop.set()
            wizard.say("ending the test run …")
        elif wizard.outlook is None or not wizard.run.data:
            wizard.say("the test run needs a model and data")
        else:
            self.running = True
            self._stop.clear()
            wizard.say("test run: loading the libraries …")
            run = wizard.run
            wizard.run_worker(lambda: self._work(run), thread=True, group="probe", exit_on_error=False)

    def stop(self) -> None:
        """End it with the screen that asked for it."""
        self._stop.set()

    def _work(self, run: RunConfig) -> None:
        wizard = self._wizard

        def say(phase: str, done: int, total: int) -> None:
            if not self._stop.is_set():
                text = f"test run: {phase}" + (f" {done} of {total}" if total else "")
                wizard.app.call_from_thread(wizard.say, text)

        try:
            told = "\n".join(probe_lines(wizard.desk.probe(run, PROBE_ROWS, say, self._stop.is_set)))
        except Stopped:
            told = "the test run was ended; nothing of it is kept"
        except EngineError as error:
            told = one_line(error, limit=600)
        except Exception as error:  # noqa: BLE001  whatever the test run raises is shown; what was chosen stays
            told = f"{type(error).__name__}: {without_secrets(error)}"
        wizard.app.call_from_thread(self._done, told)

    def _done(self, told: str) -> None:
        self.running = False
        self._wizard.say(told)
        self._wizard.refresh_all()


class Start:
    """Checks the run once more and starts it; it can be given up until it has begun."""

    def __init__(self, wizard: WizardScreen, start: Callable[[RunConfig, Reading], Path] | None) -> None:
        """Start by `start`, which returns the folder of the run."""
        self._wizard, self._start = wizard, start
        self._given_up = False
        self.running = False
        self.began = False

    def begin(self, *, queue: bool = False) -> None:
        """Start the run, or put it into the queue, or say all that is wrong with it."""
        wizard = self._wizard
        found = problems(wizard.run)
        if self._start is None and not found and not queue:
            found = [Problem("", "nothing here can start a run", "use the command that stands here")]
        if found:
            wizard.show_problems(found)
            return
        self.running, self._given_up = True, False
        wizard.say("checking the run …")
        run, work = wizard.run, self._queue if queue else self._work
        wizard.run_worker(lambda: work(run), thread=True, group="start", exit_on_error=False)

    def give_up(self) -> None:
        """Let the check end as soon as it can; nothing has been begun until then."""
        self._given_up = True

    def _work(self, run: RunConfig) -> None:
        folder, found = begun(self._start, run, self._reading()) if self._start else (None, [])
        self._wizard.app.call_from_thread(self._done, folder, found)

    def _queue(self, run: RunConfig) -> None:
        """Queue the run; the page stays, since a variant of it may be the next."""
        number = 0

        def put(run: RunConfig, reading: Reading) -> Path:
            nonlocal number
            number = enqueue(run, self._wizard.preset, reading)
            return Path()

        _, found = begun(put, run, self._reading())
        self._wizard.app.call_from_thread(self._queued, number, found)

    def _queued(self, number: int, found: list[Problem]) -> None:
        self.running = False
        if found:
            self._wizard.show_problems(found)
        else:
            self._wizard.say(f"queued as {number}; change something and queue another, or quit and say: qlora-tui queue run")

    def _reading(self) -> Reading:
        app = self._wizard.app
        return Reading(lambda share, text: app.call_from_thread(self._wizard.say, text), self._go_on)

    def _go_on(self) -> None:
        if self._given_up or self._wizard.stop_at_start:
            raise Stopped("the start was given up; nothing was begun")

    def _done(self, folder: Path | None, found: list[Problem]) -> None:
        wizard = self._wizard
        self.running = False
        if folder is None:
            wizard.show_problems(found)
            if wizard.stop_at_start:
                wizard.app.action_leave()
            return
        self.began = True
        wizard.drop_draft()
        wizard.app.show_run(folder, stop=wizard.stop_at_start)
