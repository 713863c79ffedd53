"""Signals of this process, turned into wishes: a handler assigns, says one sentence, and returns.

Saving inside a handler tears files, and locks taken there can wait for themselves, so the owner thread does the
work at its next safe point. Only the second Ctrl+C, or the second SIGTERM, acts at once: it ends the process.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from qlora_tui.engine.errors import ExitCode

if TYPE_CHECKING:
    from qlora_tui.engine.session import Session

_CODES = {signal.SIGINT: ExitCode.INTERRUPTED, signal.SIGTERM: ExitCode.TERMINATED}
_NAMES = {signal.SIGINT: "Ctrl+C", signal.SIGTERM: "SIGTERM"}


def say_on_stderr(text: str) -> None:
    """Write a sentence straight to descriptor 2: Python's streams may be in use by what was interrupted."""
    try:
        os.write(2, f"\n{text}\n".encode())
    except OSError:  # nobody is there
        return


class Signals:
    """SIGINT, SIGTERM and SIGHUP for as long as a run may be alive; install in the main thread."""

    def __init__(
        self,
        *,
        say: Callable[[str], object] = say_on_stderr,
        restore: Callable[[], object] = lambda: None,
        too_early: Callable[[int, str], object] = lambda code, why: None,
    ) -> None:
        """Say sentences with `say`; call `restore` (the terminal) before the process is ended.

        `too_early` is called with the exit code and why, when a signal ends the process before there is a run to stop.
        """
        self.session: Session | None = None
        self.hung_up = False
        self.say = say
        self._restore, self._too_early = restore, too_early
        self._presses = {signal.SIGINT: 0, signal.SIGTERM: 0}
        self._before: dict[signal.Signals, Any] = {}

    def mind(self, session: Session) -> Session:
        """Stop this run from now on when a signal comes; and give the terminal back when its watchdog has to end it."""
        self.session = session
        session.hung = self._hung
        return session

    def _hung(self, told: str) -> None:
        self.say(f"{told}: ended; what came after the last checkpoint is not saved")
        if self.session is not None:
            self.session.end_now(ExitCode.FAILED, self._restore, told)

    def __enter__(self) -> Signals:
        """Install the handlers, remembering what was there."""
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        self.install()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Put back what was there."""
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def install(self) -> None:
        """Take the signals, also back from an event loop, which leaves their defaults behind when it closes."""
        signal.signal(signal.SIGINT, self._end)
        signal.signal(signal.SIGTERM, self._end)
        signal.signal(signal.SIGHUP, self._hang_up)

    def _end(self, number: int, frame: FrameType | None) -> None:
        """Ask the run to stop; the second time, or without a run, end the process."""
        which = signal.Signals(number)
        code, session = _CODES[which], self.session
        self._presses[which] += 1
        if session is None:
            why = f"{_NAMES[which]}: stopped before the run began"
            self._too_early(int(code), why)
            self._leave(why, int(code))
        elif not session.running:
            self._leave("the run has ended", session.exit_code)
        elif self._presses[which] > 1:
            self.say("ended at once; what came after the last checkpoint is not saved")
            session.end_now(int(code), self._restore)
        else:
            session.ask("stop", _NAMES[which], code)
            self.say(f"{_NAMES[which]}: stopping at the next safe point and saving; once more ends at once without saving")

    def _hang_up(self, number: int, frame: FrameType | None) -> None:
        """The terminal is gone: whoever draws ends, the run goes on."""
        self.hung_up = True

    def _leave(self, text: str, code: int) -> None:
        self.say(text)
        try:
            self._restore()
        finally:
            os._exit(code)
