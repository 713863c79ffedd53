"""The screens as one program: what they may ask of the caller, and how they end.

The app never imports torch, the session or the training loop. It asks `start` for a run and gets a folder; from
there on it only reads that folder's journal. A crash here, a lost terminal or a hang-up ends the viewer and
never the run: `run_app` returns what happened, and the caller decides.
"""

from __future__ import annotations

import codecs
import contextlib
import locale
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Literal

from textual.app import App
from textual.binding import Binding, BindingType
from textual.driver import Driver
from textual.drivers.linux_driver import LinuxDriver
from textual.screen import Screen

from qlora_tui.engine.places import place
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.text import one_line, redact, safe_text
from qlora_tui.tui import opening, window
from qlora_tui.tui.driver import PatientDriver
from qlora_tui.tui.preferences import Preferences, read, remember_theme, textual_keymap
from qlora_tui.tui.reading import Reading
from qlora_tui.tui.screens import themes
from qlora_tui.tui.screens.desk import Desk
from qlora_tui.tui.screens.keys import KeyedScreen, bindings
from qlora_tui.tui.screens.palette import PaletteDialog
from qlora_tui.tui.screens.run import RunScreen
from qlora_tui.tui.screens.wizard import WizardScreen
from qlora_tui.tui.terminal import TerminalGuard, restore_terminal

Kind = Literal["quit", "detached", "finished", "hangup", "crashed", "no-run"]
Start = Callable[[RunConfig, Reading], Path]
Own = Callable[[bool], Screen[None]]
RUN_LOG = "log.txt"


@dataclass(frozen=True, slots=True)
class AppExit:
    """How the screens ended, and which run they showed last."""

    kind: Kind
    folder: Path | None = None
    detail: str = ""


class TunerApp(App[AppExit]):
    """The wizard and the run screen."""

    TITLE = "qlora-tui"
    ENABLE_COMMAND_PALETTE = False
    CSS_PATH: ClassVar[list[str | os.PathLike[str]]] = [  # type: ignore[assignment]  # Textual's union type is narrower than its use
        "screens/app.tcss",
        "screens/run.tcss",
        "screens/dialogs.tcss",
        "screens/wizard.tcss",
    ]
    BINDINGS: ClassVar[list[BindingType]] = bindings("app")

    def __init__(
        self,
        *,
        start: Start | None,
        draft: RunConfig | None,
        follow: Path | None,
        readonly: bool = False,
        ascii_only: bool = False,
        demo: bool = False,
        on_abort: Callable[[], object] | None = None,
        on_ready: Callable[[], object] | None = None,
        screen: Own | None = None,
        desk: Desk | None = None,
        guard: TerminalGuard | None = None,
        preferences: Preferences | None = None,
    ) -> None:
        """Keep what the screens need; see `run_app`."""
        super().__init__()
        self.animation_level = "none"
        self.set_class(ascii_only, "-ascii")
        self._dress(preferences or Preferences())
        self.start, self.draft, self.follow = start, draft, follow
        self.readonly, self.ascii_only, self.demo = readonly, ascii_only, demo
        self.folder = follow
        self.desk = desk or Desk()
        self.failure = ""
        self.left: AppExit | None = None
        self._on_abort, self._on_ready, self._own = on_abort, on_ready, screen
        self._guard = guard
        self._signals: set[int] = set()
        self._titled = ""

    def _dress(self, preferences: Preferences) -> None:
        """Put on the theme and the keys that are preferred."""
        for theme in themes.THEMES:
            self.register_theme(theme)
        few = self.console.color_system == "standard"
        self.theme = themes.chosen(preferences.theme, os.environ, few_colours=few)
        self.chosen_keys: Mapping[str, str] = preferences.keys
        self.set_keymap(textual_keymap(preferences.keys))

    def get_driver_class(self) -> type[Driver]:
        """Return the driver that no byte ends, in the place of Textual's own for terminals."""
        chosen = super().get_driver_class()
        return PatientDriver if chosen is LinuxDriver else chosen

    def on_mount(self) -> None:
        """Open the first screen."""
        if self._guard is not None:
            self._guard.route()
        self.say_title("qlora-tui")
        if hint := window.ssh_hint(os.environ):
            self.notify(hint, timeout=12, markup=False)
        self.set_interval(0.25, self._watch_outside)
        self.call_after_refresh(opening.end)
        if self._own is not None:
            self.push_screen(self._own(self.ascii_only))
        elif self.follow is not None:
            self.show_run(self.follow)
        else:
            self.push_screen(WizardScreen(self.desk, self.draft, start=self.start, demo=self.demo, ascii_only=self.ascii_only))

    def show_run(self, folder: Path, *, stop: bool = False) -> None:
        """Go over to the run in `folder`; `stop` asks it to stop at once, since the person already wanted to leave."""
        self.folder = folder
        owned = self._on_abort is not None
        if self._guard is not None and owned:
            self._guard.move_log(folder / RUN_LOG)
        screen = RunScreen(folder, self._leave_as, owned=owned, readonly=self.readonly, ascii_only=self.ascii_only)
        if isinstance(self.screen, WizardScreen):
            self.switch_screen(screen)
        else:
            self.push_screen(screen)
        if stop:
            self.call_after_refresh(screen.interrupt)

    def ready(self) -> None:
        """Tell the caller that a run is about to be started, so that it may load libraries meanwhile."""
        if self._on_ready is not None:
            self._on_ready()

    def take_signal(self, number: int) -> None:
        """Remember a signal; called from its handler, so it only assigns."""
        self._signals.add(number)

    @property
    def run_screen(self) -> RunScreen | None:
        """Return the run screen if there is one, also under a dialog."""
        return next((screen for screen in self.screen_stack if isinstance(screen, RunScreen)), None)

    def action_interrupt(self) -> None:
        """Obey Ctrl+C: stop and save at once, abort the second time; leave where nothing runs."""
        screen = self.run_screen
        if screen is None:
            self._leave_wizard()
            return
        if screen.running and not screen.owned and not screen.readonly:
            self._top_action(screen.action_leave)  # a viewer of another process asks first
            return
        if screen.interrupt():
            return
        if self._on_abort is not None:
            restore_terminal()
            self._on_abort()
        screen.abort()

    def action_leave(self) -> None:
        """Obey Ctrl+Q: as `q` on the run screen; out of the wizard without a run."""
        screen = self.run_screen
        if screen is None:
            self._leave_wizard()
        else:
            self._top_action(screen.action_leave)

    def action_palette(self) -> None:
        """List what can be done now; what is chosen is done as if its key had been pressed."""
        if isinstance(self.screen, KeyedScreen):
            self.push_screen(PaletteDialog(self.screen))

    def action_theme(self) -> None:
        """Go over to the other theme, and keep that for the next time."""
        choice, self.theme = themes.other(self.theme)
        remember_theme(choice)

    def copy_out(self, text: str, *folders: Path) -> None:
        """Send `text` to the terminal's clipboard and into a file, and say so without claiming more."""
        self.copy_to_clipboard(text)
        self.notify(one_line(window.copy_words(window.keep_copy(text, folders)), limit=300), timeout=6, markup=False)

    def say_title(self, text: str) -> None:
        """Set the window's title where there is one; sent only when it changed."""
        if text != self._titled and self._driver is not None and window.has_title(os.environ):
            self._titled = text
            self._driver.write(window.title(text))  # as Textual sends what it copies: through its writer, between two frames

    def get_key_display(self, binding: Binding) -> str:
        """Name keys in words where arrows and carets cannot be shown."""
        shown = super().get_key_display(binding)
        return shown if not self.ascii_only or shown.isascii() else binding.key.split(",")[0]

    def _leave_wizard(self) -> None:
        """Leave without a run; one that is just being started is given up, or stopped where it began already."""
        wizard = next((screen for screen in self.screen_stack if isinstance(screen, WizardScreen)), None)
        if wizard is not None and wizard.starting:
            wizard.stop_at_start = True
            self.notify("leaving in a moment", timeout=5, markup=False)
        else:
            self._leave_as("no-run")

    def _top_action(self, action: Callable[[], None]) -> None:
        if not isinstance(self.screen, RunScreen):
            self.pop_screen()
        action()

    def _leave_as(self, kind: str) -> None:
        kinds: dict[str, Kind] = {"detached": "detached", "finished": "finished", "no-run": "no-run", "hangup": "hangup"}
        self.left = AppExit(kinds.get(kind, "quit"), self.folder)
        self.exit(self.left)

    def _watch_outside(self) -> None:
        """Obey signals, and notice a terminal that went away without one."""
        if self._guard is not None and not self._guard.hung_up and self._guard.gone:
            self._guard.hang_up()
            self._signals.add(signal.SIGHUP)
        if self._signals:
            self._obey_signals()

    def _obey_signals(self) -> None:
        taken, self._signals = self._signals, set()
        screen = self.run_screen
        if signal.SIGHUP in taken:
            self._leave_as("hangup")
        elif screen is None:
            self._leave_wizard()
        elif not screen.running:
            self._leave_as("finished")
        elif screen.owned:
            screen.leave_when_finished()
        else:
            self._leave_as("quit")

    def _fatal_error(self) -> None:
        """Keep the traceback without local variables, which may hold tokens, and close; the caller writes it down."""
        error = self._exception
        told = traceback.format_exception(error) if error else ["the screen failed without saying why"]
        self.failure = safe_text(redact("".join(told)))
        self._close_messages_no_wait()


def run_app(
    *,
    start: Start | None,
    draft: RunConfig | None,
    follow: Path | None,
    readonly: bool = False,
    mouse: bool = True,
    ascii_only: bool = False,
    demo: bool = False,
    on_abort: Callable[[], object] | None = None,
    on_ready: Callable[[], object] | None = None,
    screen: Own | None = None,
    preferences: Preferences | None = None,
) -> AppExit:
    """Show the screens until they end, and give the terminal back as it was.

    Args:
        start: checks and starts a run and returns its folder; called on a thread of its own, so it must not
            install signal handlers. It may raise EngineError, which the wizard shows.
        draft: what the command line already says about the run; the wizard begins with it.
        follow: show this run instead of the wizard.
        readonly: leave no wishes in the run's folder.
        mouse: let the terminal report the mouse.
        ascii_only: draw with ASCII alone; also chosen where the locale is not UTF-8.
        demo: the draft is complete: Enter alone walks through, and nothing is kept for the next time.
        on_abort: the run lives in this process; called for the second Ctrl+C with the terminal restored.
        on_ready: called once on the page before the start.
        screen: show this one instead of the run and the wizard; made once it is known whether only ASCII can be drawn.
        preferences: theme and keys; read from the person's file where they are not given.

    Raises:
        ConfigError: that file cannot be used.
    """
    os.environ.setdefault("TEXTUAL_ANIMATIONS", "none")
    preferences = preferences or read()
    guard = TerminalGuard(place("state") / "screen.log")
    app = TunerApp(
        start=start,
        draft=draft,
        follow=follow,
        readonly=readonly,
        ascii_only=ascii_only or not _speaks_utf8(),
        demo=demo,
        on_abort=on_abort,
        on_ready=on_ready,
        screen=screen,
        guard=guard,
        preferences=preferences,
    )
    with guard, _signals(app, guard):
        try:
            app.run(mouse=mouse)
        except Exception:  # noqa: BLE001  whatever breaks the screens must not break the run
            app.failure = safe_text(redact(traceback.format_exc()))
        opening.end()  # where no frame was ever drawn
        lost = guard.gone
        if app.failure:
            sys.stderr.write(f"the screen failed:\n{app.failure}\n")  # the guard sends this to the log
    return _exit_of(app, hung_up=guard.hung_up or lost)


def _exit_of(app: TunerApp, *, hung_up: bool) -> AppExit:
    if hung_up:
        return AppExit("hangup", app.folder)
    if app.left is not None:  # what breaks on the way out, when the person has left already, is only logged
        return app.left
    return AppExit("crashed", app.folder, app.failure.strip().rsplit("\n", 1)[-1])


@contextlib.contextmanager
def _signals(app: TunerApp, guard: TerminalGuard) -> Iterator[None]:
    """Let signals reach the app as flags, after whatever handler the caller had; put the old ones back."""
    kept: dict[signal.Signals, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        app.take_signal(number)
        if number == signal.SIGHUP:
            guard.hang_up()
        guard.hurry()
        before = kept.get(signal.Signals(number))
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)

    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        kept[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, before in kept.items():
            signal.signal(number, before)


def _speaks_utf8() -> bool:
    try:
        return codecs.lookup(locale.getpreferredencoding(False)).name == "utf-8"
    except LookupError:
        return False
