"""The run screen: follows a run's journal, wherever that run lives, and leaves wishes for it.

It holds no reference to the run itself. Four times a second at most it reads what was appended, folds it and lets
each panel draw; a panel sends cells only when they changed.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal
from textual.timer import Timer
from textual.widgets import Input

from qlora_tui.engine.errors import JournalError
from qlora_tui.engine.journal import is_running, leave_wish
from qlora_tui.engine.text import one_line
from qlora_tui.tui import window
from qlora_tui.tui.panels.base import Panel, View
from qlora_tui.tui.panels.device import DevicePanel
from qlora_tui.tui.panels.findings import FindingsPanel
from qlora_tui.tui.panels.log import LogPanel
from qlora_tui.tui.panels.loss import LossPanel
from qlora_tui.tui.panels.memory import MemoryPanel
from qlora_tui.tui.panels.samples import SamplesPanel
from qlora_tui.tui.panels.scorecard import ScorecardPanel
from qlora_tui.tui.panels.status import StatusLine
from qlora_tui.tui.panels.summary import SummaryPanel
from qlora_tui.tui.screens.curve import PANELS, LookingScreen
from qlora_tui.tui.screens.dialogs import Choice, HelpDialog, StopDialog
from qlora_tui.tui.screens.keys import KeyLine, bindings, help_of
from qlora_tui.tui.screens.line import Line
from qlora_tui.tui.screens.steering import STEERS, Waiting, promise

if TYPE_CHECKING:
    from qlora_tui.tui.app import TunerApp

TICK = 0.25
OWN_TICKS = (TICK, 0.5, 1.0, 2.0)
OWN_SHARE = 0.005
"""The screen of a run in this process takes no more than this share of the interpreter, which the run's own thread wants."""
SLOW_TICK = 1.0  # for a run that has ended: nothing more is expected, though a resume may still come
UNSEEN_TICK = 2.0  # while the terminal reports that it lost the focus
_FILL_SLICE, _FILL_GAP = 0.05, 0.015
_SILENT = 5.0

Leave = Callable[[str], None]


class RunScreen(LookingScreen):
    """One run, live or finished."""

    app: TunerApp

    AUTO_FOCUS = ""  # keys belong to the screen; the search line takes the focus only when asked for
    HORIZONTAL_BREAKPOINTS = [(0, "-tiny"), (40, "-narrow"), (60, "-normal"), (110, "-wide")]  # noqa: RUF012  Textual declares it without ClassVar
    VERTICAL_BREAKPOINTS = [(0, "-flat"), (12, "-short"), (22, "-usual"), (30, "-tall")]  # noqa: RUF012
    place = "run"
    BINDINGS: ClassVar[list[BindingType]] = bindings("run")

    def __init__(self, folder: Path, leave: Leave, *, owned: bool, readonly: bool, ascii_only: bool) -> None:
        """Follow the run in `folder`.

        Args:
            folder: the run's folder; its journal need not exist yet.
            leave: closes the screen with a reason: "quit", "detached" or "finished".
            owned: the run lives in this process, so leaving means to stop it or to let it go on unseen.
            readonly: leave no wishes.
            ascii_only: draw without anything beyond ASCII.
        """
        super().__init__(folder, View(now=time.time(), ascii_only=ascii_only, readonly=readonly, folder=str(folder)))
        self.owned, self.readonly = owned, readonly
        self._leave = leave
        self._opened = time.time()
        self._checked = 0.0
        self._timer: Timer | None = None
        self._pace = 0.0
        self._spent = time.thread_time()
        self._costs = deque([0.0] * 5, maxlen=5)
        self._leave_at_end = False
        self._interrupted = False
        self._was_running = True
        self._waiting = Waiting()
        self._seen_running = self._rung_bad = False
        self._titled_at = 0.0
        self._filling = False

    def compose(self) -> ComposeResult:
        """Lay out the panels; what is seen of them at which size is in the style sheet."""
        yield StatusLine(id="status")
        yield SummaryPanel(id="summary")
        yield LossPanel(id="loss")
        with Horizontal(id="meters"):
            yield MemoryPanel(id="memory")
            yield DevicePanel(id="device")
        yield ScorecardPanel(id="scorecard")
        yield SamplesPanel(id="samples")
        yield FindingsPanel(id="findings")
        yield LogPanel(id="log")
        yield Line(placeholder="words to look for in the log", id="find", compact=True)
        yield KeyLine()

    def on_mount(self) -> None:
        """Show what is there, then look again four times a second."""
        self.set_class(self.view.ascii_only, "-ascii")
        self.query_one("#find", Input).display = False
        self._choose_panel(0)
        self.watch(self.app, "app_focus", self._keep_pace, init=False)
        self.look()

    def look(self) -> None:
        """Read what was appended, fold it, and draw; a long history is read in slices so that keys still answer."""
        now = time.time()
        self._weigh()
        if not self._read(0.1):
            return
        if self.state.finished:
            self.view = replace(self.view, stopping=False)
        share = round(self.follower.share, 2)
        self.view = replace(self.view, now=now, lost=self._is_lost(now), close=self._close_look(self.view.sight), share=share)
        if self.state.finished and self._leave_at_end:
            self._leave("finished")
            return
        self.draw()
        self._keep_pace()
        if self.behind and not self.owned and not self._filling:
            self._filling = True
            self.set_timer(_FILL_GAP, self._fill)

    def _fill(self) -> None:
        """Fold a slice of a long history between two looks; not where the run shares this process and wants the time."""
        self._filling = self._read(_FILL_SLICE) and self.behind and self.is_attached
        if self._filling:
            self.set_timer(_FILL_GAP, self._fill)

    def _read(self, seconds: float) -> bool:
        try:
            self.follower.look(seconds)
        except JournalError as error:
            self.app.notify(one_line(error), severity="error", timeout=30, markup=False)
            self._leave("quit")
            return False
        return True

    def _keep_pace(self) -> None:
        """Look often while something may happen, seldom once the run has ended, and where the terminal says that nobody looks."""
        pace = self._affordable() if self.running or self.behind else SLOW_TICK
        pace = pace if self.app.app_focus else UNSEEN_TICK
        if pace == self._pace or not self.is_attached:
            return
        if self._timer is not None:
            self._timer.stop()
            if pace < self._pace:
                self.call_later(self.look)  # what came meanwhile is shown at once
        self._pace, self._timer = pace, self.set_interval(pace, self.look)

    def _weigh(self) -> None:
        """Keep what a look and all of its drawing cost, in seconds of the processor."""
        before, self._spent = self._spent, time.thread_time()
        self._costs.append(self._spent - before)

    def _affordable(self) -> float:
        """Return how long to wait for the next look: a run that launches kernels from this process stands still while this thread draws."""
        if not self.owned or self.view.stopping:
            return TICK
        cost = statistics.median(self._costs)  # the first look, which draws everything, says nothing
        return next((pace for pace in OWN_TICKS if cost <= pace * OWN_SHARE), OWN_TICKS[-1])

    def draw(self) -> None:
        """Let every panel draw the state as it is."""
        ended = self.state.finished is not None or self.view.lost
        self.set_class(ended, "-ended")
        self.set_class(bool(self.state.warnings), "-warned")
        self.set_class(bool(self.state.samples), "-sampled")
        for panel in self.query(Panel):
            panel.show(self.state, self.view)
        for refusal in self._waiting.refused(self.state.answers):
            self.app.notify(refusal, severity="warning", timeout=8, markup=False)
        self._tell_terminal()
        if self.running != self._was_running:
            self._was_running = self.running
            self.refresh_bindings()
            if self._seen_running:
                self.app.bell()
            if not self.running and isinstance(self.app.screen, StopDialog):
                self.app.screen.dismiss("cancel")  # nothing is left to stop: show how it ended instead
        self._seen_running = self.running and not self.behind

    def _tell_terminal(self) -> None:
        """Set the window's title, once a second at most, and ring once when the loss stops being a number."""
        now = self.view.now
        if now - self._titled_at >= 1.0 or not self.running:
            self._titled_at = now
            self.app.say_title(window.run_title(self.state, now, lost=self.view.lost))
        if self.state.history.bad and not self._rung_bad:
            self._rung_bad = True
            if self._seen_running:
                self.app.bell()

    @property
    def running(self) -> bool:
        """Say whether there is still a run to stop."""
        return self.state.finished is None and not self.view.lost

    def interrupt(self) -> bool:
        """Ask the run to stop and save, at once; return False if it was asked already, so that the caller aborts."""
        if not self.running or self.readonly:
            self._leave("finished" if self.state.finished else "quit")
            return True
        if self._interrupted:
            return False
        self._interrupted = True
        self._leave_at_end = self.owned
        if not self.view.stopping:
            self._wish("stop")
        self.app.notify("stopping; Ctrl+C again ends at once, without saving", timeout=6, markup=False)
        return True

    def leave_when_finished(self) -> None:
        """Close the screen as soon as the run has written its last word."""
        self._leave_at_end = True
        self.view = replace(self.view, stopping=True)

    def abort(self) -> None:
        """Ask the run to end at once."""
        self._wish("abort")

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer no key that would do nothing."""
        if action in ("stop", *STEERS):
            return self.running and not self.readonly
        if action == "detach":
            return self.running
        return True

    def action_stop(self) -> None:
        """Ask how to stop."""
        self.look()
        if not self.running:
            return
        self.app.push_screen(StopDialog(), self._chosen)

    def action_leave(self) -> None:
        """Leave; a run that trains in this process, or that this viewer may steer, is asked about first."""
        self.look()  # the last word may have come since the last look
        if not self.running:
            self._leave("finished" if self.state.finished else "quit")
        elif self.readonly:
            self._leave("quit")
        else:
            self.app.push_screen(StopDialog(first="stop" if self.owned else "detach"), self._chosen)

    def leave(self) -> None:
        """Leave a run that has ended; `esc` ends none that goes on."""
        if not self.running:
            self.action_leave()

    def action_detach(self) -> None:
        """Close the screen and let the run go on."""
        self._leave("detached")

    def action_save(self) -> None:
        """Ask for a checkpoint."""
        self._wish("save")

    def action_pause(self) -> None:
        """Ask for a pause, or for its end."""
        self._wish("resume" if self.state.asked_to_pause else "pause")

    def action_copy(self) -> None:
        """Copy what the chosen panel says; a viewer that only looks writes nothing into the run's folder."""
        text = self.query_one(f"#{PANELS[self._selected]}", Panel).words()
        self.app.copy_out(text, *(() if self.readonly else (self.folder,)))

    def action_sample(self) -> None:
        """Ask what the model answers now."""
        self._wish("sample")

    def action_slower(self) -> None:
        """Ask for half the learning rate."""
        self._wish("set", {"key": "learning_rate", "factor": 0.5})

    def action_faster(self) -> None:
        """Ask for double the learning rate."""
        self._wish("set", {"key": "learning_rate", "factor": 2.0})

    def action_help(self) -> None:
        """Show the keys."""
        marks = "Marks on the loss axis: C or a triangle saved, ! warning, L learning rate set, P pause, R resumed, B went back."
        notes = ["Ctrl+C stops and saves at once; a second Ctrl+C ends without saving.", one_line(f"This run: {self.folder}")]
        self.app.push_screen(HelpDialog(help_of(self), [marks, *(notes if self.running else notes[1:])]))

    def _chosen(self, choice: Choice | None) -> None:
        if choice == "stop":
            self._wish("stop")
        elif choice == "abort":
            self.abort()
        elif choice == "detach":
            self._leave("detached")

    def _wish(self, name: str, args: Mapping[str, Any] | None = None) -> None:
        if self.readonly or not self.running:
            return
        try:
            self._waiting.ask(leave_wish(self.folder, name, args, attempt=self.state.attempt), name)
        except OSError as error:
            self.app.notify(f"could not ask the run to {name}: {one_line(error)}", severity="error", markup=False)
            return
        if name in ("stop", "abort"):
            self.view = replace(self.view, stopping=True)
            self.draw()
        else:
            self.app.notify(promise(name, args), timeout=4, markup=False)

    def _is_lost(self, now: float) -> bool:
        """Say whether the run ended without a last word: its lock is free and nothing came for a while."""
        if self.state.finished or now - max(self._opened, self.state.t) < _SILENT:
            return False
        if now - self._checked < 1.0:
            return self.view.lost
        self._checked = now
        return not is_running(self.folder)
