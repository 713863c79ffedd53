"""A thread that notices when a run shows no sign of life: a kernel that hangs raises no error and ends no step.

It only says so, with the phase, how long, and where in the code the owner stands; ending the run has to be asked for.
"""

from __future__ import annotations

import logging
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable

from qlora_tui.engine.events import Device, Event, Finding, Phase, Stepped
from qlora_tui.engine.units import words

SHORTEST_SECONDS = 60.0
"""Nothing is said earlier, however quick the steps are."""
_TIMES_A_STEP = 10
_OTHER_SECONDS = 300.0
"""Patience where there is no pace to compare with: loading, the first steps, a measurement's next batch."""
_STEPS = 32
_STOPPED_SECONDS = 10.0
"""Between two looks a second apart, this much means that the whole process stood still: a suspended laptop, or Ctrl+Z."""
_PHASES = {"fetch": "the download", "load": "loading", "data": "reading the data", "plan": "planning", "probe": "the rehearsal"}
_PHASES |= {"eval": "a measurement", "save": "saving", "export": "the export"}
_log = logging.getLogger("qlora_tui.watchdog")


class Watchdog:
    """Listens to what the owner of a run says; silence is what it reports."""

    def __init__(
        self,
        write: Callable[[Event], object],
        owner: threading.Thread,
        *,
        end_after: float = 0.0,
        end: Callable[[str], object] = lambda told: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to count.

        Args:
            write: takes a finding; called on the watchdog's own thread.
            owner: whose stack goes to the log.
            end_after: seconds of silence after which `end` is called with a sentence; 0: never.
            end: ends the run.
            clock: seconds that only go forward.
        """
        self._write, self._owner, self._clock = write, owner, clock
        self._end_after, self._end = end_after, end
        self._beat = self._looked = clock()
        self._open: list[str] = []
        self._step = 0
        self._seconds: deque[float] = deque(maxlen=_STEPS)
        self._barked = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to look, about once a second."""
        self._thread.start()

    def stop(self) -> None:
        """Stop looking and wait until the last word is written; idempotent, and safe before `start`."""
        self._stopping.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def see(self, event: Event) -> list[Finding]:
        """Take note that the owner lives; after a silence that was told, return the sentence that it is over."""
        if isinstance(event, Device):
            return []
        quiet, self._beat = self._clock() - self._beat, self._clock()
        if isinstance(event, Phase):
            self._follow(event)
        if isinstance(event, Stepped):
            self._step = event.step
            self._seconds.append(event.seconds)
        if not self._barked:
            return []
        self._barked = False
        return [Finding("watchdog", "info", self._step, f"the run goes on after {words(quiet)} without a sign of life")]

    def look(self) -> None:
        """Say once that the run is silent for too long, and end it where that was asked for."""
        since, self._looked = self._clock() - self._looked, self._clock()
        if since > _STOPPED_SECONDS:
            self._beat += since  # nobody could give a sign of life meanwhile
        quiet, patience = self._looked - self._beat, self._patience()
        if patience is None:
            return
        told = f"no sign of life for {words(quiet)} in {self._where()}"
        if quiet > patience and not self._barked:
            self._barked = True
            _log.warning("%s; the owner stands here:\n%s", told, self._stack())
            self._write(self._finding(told, quiet, patience))
        if 0 < self._end_after < quiet:
            self._stopping.set()
            self._end(f"{told}, and end_if_hung is {words(self._end_after)}")

    def _run(self) -> None:
        while not self._stopping.wait(1.0):
            self.look()

    def _follow(self, phase: Phase) -> None:
        if phase.state == "begin":
            self._open.append(phase.name)
        elif phase.state == "end" and phase.name in self._open:
            del self._open[self._open.index(phase.name) :]

    def _patience(self) -> float | None:
        """Return the seconds of silence that are usual here; None in a pause, which is silent on purpose."""
        now = self._open[-1] if self._open else ""
        if now == "pause":
            return None
        if now == "train" and len(self._seconds) >= 3:
            return max(SHORTEST_SECONDS, _TIMES_A_STEP * statistics.median(self._seconds))
        return _OTHER_SECONDS

    def _where(self) -> str:
        now = self._open[-1] if self._open else ""
        return f"step {self._step + 1}" if now == "train" else _PHASES.get(now, "the preparations")

    def _finding(self, told: str, quiet: float, patience: float) -> Finding:
        usual = statistics.median(self._seconds) if self._seconds else None
        pace = f"; a step usually takes {words(usual)}" if usual is not None else ""
        advice = (
            "log.txt says where in the code it stands; nvidia-smi whether the device still works",
            "Ctrl+C twice ends it at once, and --resume goes on from the last checkpoint",
            "end_if_hung=30m would end such a run by itself",
        )
        numbers = {"seconds": quiet, "usual_seconds": usual, "patience_seconds": patience}
        return Finding("watchdog", "warn", self._step, told + pace, advice, numbers)

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._owner.ident or 0)
        return "".join(traceback.format_stack(frame)) if frame is not None else "(it has ended)"
