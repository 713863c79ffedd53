"""The wizard: five pages that change one run, with its cost at the foot of every page.

Nothing is lost by going back, by an error at the start, or by leaving: an unfinished run is kept as a draft and
offered the next time (never for a demo).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.content import Content
from textual.dom import DOMNode
from textual.widgets import ContentSwitcher, Static

from qlora_tui.engine.errors import EngineError, Problem, Stopped
from qlora_tui.engine.fixes import Fix
from qlora_tui.engine.rules import problems
from qlora_tui.engine.spec import RunConfig, from_values, values_of
from qlora_tui.engine.text import one_line, redact
from qlora_tui.tui import words
from qlora_tui.tui.datalook import DataLook
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.budgetbar import draw_outlook, in_few_words
from qlora_tui.tui.panels.cells import Part
from qlora_tui.tui.probe import probe_lines
from qlora_tui.tui.reading import Reading
from qlora_tui.tui.screens.command import equivalent
from qlora_tui.tui.screens.data import DataPage
from qlora_tui.tui.screens.desk import Desk, Outlook
from qlora_tui.tui.screens.dialogs import HelpDialog
from qlora_tui.tui.screens.go import GoPage, begun
from qlora_tui.tui.screens.keys import KeyedScreen, KeyLine, bindings, help_of
from qlora_tui.tui.screens.model import ModelPage
from qlora_tui.tui.screens.numbers import NumbersPage
from qlora_tui.tui.screens.pages import GoalPage, Page

if TYPE_CHECKING:
    from qlora_tui.tui.app import TunerApp

PROBE_ROWS = 50
"""Rows of a test run: enough for a figure within a few percent, few enough to wait for."""
STEPS = ("goal", "model", "data", "numbers", "go")


class WizardScreen(KeyedScreen):
    """Goal, model, data, numbers, go."""

    app: TunerApp

    HORIZONTAL_BREAKPOINTS = [(0, "-tiny"), (40, "-narrow"), (60, "-normal"), (110, "-wide")]  # noqa: RUF012  Textual declares it without ClassVar
    VERTICAL_BREAKPOINTS = [(0, "-bare"), (12, "-flat"), (14, "-short"), (22, "-usual")]  # noqa: RUF012
    place = "wizard"
    BINDINGS: ClassVar[list[BindingType]] = bindings("wizard")

    def __init__(
        self, desk: Desk, given: RunConfig | None, *, start: Callable[[RunConfig, Reading], Path] | None, demo: bool, ascii_only: bool
    ) -> None:
        """Begin with `given`, what the command line already says.

        Args:
            desk: the engine, as the wizard sees it.
            given: prefilled values; the pages change them.
            start: checks and starts a run and returns its folder.
            demo: the run is complete, so Enter alone walks through; no draft is read or kept.
            ascii_only: draw without anything beyond ASCII.
        """
        super().__init__()
        self.desk, self.demo, self.ascii_only = desk, demo, ascii_only
        self.run = given or RunConfig()
        self.data_look: DataLook | None = None
        self._measured: dict[tuple[str, ...], DataLook | None] = {}
        self.outlook: Outlook | None = None
        self._given, self._start = given, start
        self._preset = "demo" if demo else ""
        self._preset_run: RunConfig | None = None
        self._page = 0
        self._changed = False
        self._advice: Fix | None = None
        self._told_ready = False
        self._keys: tuple[int, bool] = (-1, True)
        self.starting = False
        self.probing = False
        self._stop_probe = threading.Event()
        self.stop_at_start = self._given_up = False

    def compose(self) -> ComposeResult:
        """Lay out the steps, the pages and the bar."""
        yield Static("", markup=False, id="steps")
        with ContentSwitcher(initial="page-goal", id="pages"):
            yield GoalPage(self, self._given)
            yield ModelPage(self)
            yield DataPage(self)
            yield NumbersPage(self)
            yield GoPage(self)
        yield Static("", markup=False, id="outlook")
        yield Static("", markup=False, id="few")
        yield KeyLine()

    def on_mount(self) -> None:
        """Show the first page."""
        self.set_class(self.ascii_only, "-ascii")
        self._show_page(0)
        self.redraw()

    def on_resize(self) -> None:
        """Draw again for the new size."""
        self.redraw()

    @property
    def page(self) -> Page:
        """Return the page in sight."""
        return self.query_one(f"#page-{STEPS[self._page]}", Page)

    def begin(self, run: RunConfig, preset: str, base: RunConfig | None) -> None:
        """Start over from `run`; `base` is what the ready-made run called `preset` says, if it came from one."""
        self._preset, self._preset_run = preset, base
        self._changed = False
        self._use(run)
        self.query_one(DataPage).read_ahead()

    def preview(self, run: RunConfig) -> None:
        """Show what `run` would need without taking it yet."""
        self.run = run
        self.redraw()

    def change(self, run: RunConfig) -> None:
        """Take a changed run and show its cost at once."""
        if run != self.run:
            self._changed = True
            self._use(run)

    def use_data(self, look: DataLook) -> None:
        """Remember what the data hold; times follow from it."""
        self.data_look = look
        self._measured = {}
        self.redraw()
        self._measure_soon()

    def command(self) -> str:
        """Return the command that does the same without screens."""
        return equivalent(self.run, preset=self._preset, base=self._preset_run)

    def action_next(self) -> None:
        """Go on, or start the run on the last page."""
        if self.starting or self.probing or not self.page.commit():
            return
        self._keep_draft()
        if self._page == len(STEPS) - 1:
            self._go()
        else:
            self._show_page(self._page + 1)

    def action_previous(self) -> None:
        """Go one page back, or give up the start that is under way."""
        if self.starting:
            self._given_up = True
        elif self._page > 0:
            self._show_page(self._page - 1)

    def action_fix(self) -> None:
        """Apply the cheapest change that the bar offers."""
        if self._advice is None or self.starting:
            return
        self.change(from_values(values_of(self.run) | dict(self._advice.values)))
        self._refresh_page()

    def action_probe(self) -> None:
        """Make the test run, or end the one under way."""
        if self.starting:
            return
        if self.probing:
            self._stop_probe.set()
            self._say("ending the test run …")
        elif self.outlook is None or not self.run.data:
            self._say("the test run needs a model and data")
        else:
            self.probing = True
            self._stop_probe.clear()
            self._say("test run: loading the libraries …")
            self._probe(self.run)

    @work(thread=True, group="probe", exit_on_error=False)
    def _probe(self, run: RunConfig) -> None:
        def say(phase: str, done: int, total: int) -> None:
            if not self._stop_probe.is_set():
                text = f"test run: {phase}" + (f" {done} of {total}" if total else "")
                self.app.call_from_thread(self._say, text)

        try:
            told = "\n".join(probe_lines(self.desk.probe(run, PROBE_ROWS, say, self._stop_probe.is_set)))
        except Stopped:
            told = "the test run was ended; nothing of it is kept"
        except EngineError as error:
            told = one_line(error, limit=600)
        except Exception as error:  # noqa: BLE001  whatever the test run raises is shown; what was chosen stays
            told = f"{type(error).__name__}: {redact(one_line(error))}"
        self.app.call_from_thread(self._probed, told)

    def _probed(self, told: str) -> None:
        self.probing = False
        self._say(told)
        self.redraw()
        self._refresh_page()

    def on_unmount(self) -> None:
        """End a test run with the screen that asked for it."""
        self._stop_probe.set()

    def action_copy(self) -> None:
        """Send the command to the terminal's clipboard; whether it took it cannot be known."""
        self.app.copy_out(one_line(self.command(), limit=20_000))  # as shown: pasted into a shell, escapes would act

    def action_text_help(self) -> None:
        """Show the keys, also where a question mark is typed."""
        self.action_help()

    def action_help(self) -> None:
        """Show the keys."""
        notes = ["The memory bar is an estimate; the run screen shows what is really used."]
        self.app.push_screen(HelpDialog(help_of(self), notes))

    def places(self) -> list[tuple[str, DOMNode]]:
        """Return whose keys are heard here, as the table of actions calls them: the page's before the wizard's."""
        return [(self.page.place, self.page), (self.place, self)]

    @property
    def typing(self) -> bool:
        """Say whether one types on this page."""
        return self.page.types

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer only the keys that do something on this page."""
        if action in ("copy", "probe"):
            return self._page == len(STEPS) - 1
        if action == "fix":
            return self._advice is not None
        if action == "previous":
            return self._page > 0
        if action == "text_help":
            return self.page.types
        return True

    def redraw(self) -> None:
        """Draw the steps and the bar for the run as it is."""
        if not self.is_mounted:
            return
        self.outlook = self.desk.outlook(self.run, self.data_of_run())
        remedies = self.desk.remedies(self.run, self.data_of_run()) if self.outlook else []
        self._advice = remedies[0] if remedies else None
        width = max(20, self.size.width - 2)
        waiting = ""
        if self.run.model_name_or_path and self.outlook is None:
            waiting = "the size of this model is not known yet: enter looks it up"
        key = "" if self.page.types else "f"  # where one types, f is a letter
        bar = draw_outlook(self.outlook, self._advice, width, now=time.time(), waiting=waiting, no_time=self._no_time(), key=key)
        self._put("#outlook", bar)
        self._put("#few", in_few_words(STEPS[self._page], self._page + 1, self.run, self.outlook, width))
        self._put("#steps", self._steps(width))
        keys = (self._page, self._advice is None)
        if keys != self._keys:
            self._keys = keys
            self.refresh_bindings()

    def _no_time(self) -> str:
        if not self.run.data:
            return "name the data to see how long it takes"
        return "known once the data have been read" if self.data_of_run() is None else "these data cannot be used"

    def _use(self, run: RunConfig) -> None:
        if run.data != self.run.data:
            self.workers.cancel_group(self, "measure")
        self.run = run
        self.redraw()
        self._measure_soon()

    def data_of_run(self) -> DataLook | None:
        """Return what the run's data hold, with rows counted by the model's own tokenizer where that was done."""
        look = self.data_look
        if look is None or look.names != self.run.data:
            return None
        return self._measured.get(self._measured_by()) or look

    def _measured_by(self) -> tuple[str, ...]:
        run = self.run
        return (run.model_name_or_path, run.revision, run.chat_template, str(run.mask_history), *run.data)

    def _measure_soon(self) -> None:
        """Count tokens on a thread, once for each model and data; `None` stands for what is at work or cannot be."""
        look, key = self.data_look, self._measured_by()
        if look is None or look.problem or look.names != self.run.data or key in self._measured or self.outlook is None:
            return
        self._measured = {known: found for known, found in self._measured.items() if found} | {key: None}
        self._measure(key, self.run, look)

    @work(thread=True, group="measure", exclusive=True, exit_on_error=False)
    def _measure(self, key: tuple[str, ...], run: RunConfig, look: DataLook) -> None:
        try:
            found = self.desk.measure(run, look)
        except Exception:  # noqa: BLE001  the guess stays; what is wrong with the tokenizer is told at the start
            found = None
        self.app.call_from_thread(self._have_measured, key, found)

    def _have_measured(self, key: tuple[str, ...], found: DataLook | None) -> None:
        if found is not None and key in self._measured:
            self._measured[key] = found
            self.redraw()
            self._refresh_page()

    def _put(self, where: str, content: Content) -> None:
        self.query_one(where, Static).update(cells.plain_ascii(content) if self.ascii_only else content, layout=False)

    def _steps(self, width: int) -> Content:
        parts: list[Part] = [("qlora-tui  ", f"bold {cells.MAIN}")] if width >= 70 else []
        for index, name in enumerate(STEPS):
            here = index == self._page
            style = f"bold {cells.MAIN}" if here else "" if index < self._page else cells.DIM
            parts.append((f"{'▸' if here else ' '}{index + 1} {name} ", style))
        machine = self.desk.machine()
        size = words.gib(machine.total_bytes)
        room = width - sum(len(text) for text, _ in parts) - len(size) - 5
        name = words.device(one_line(machine.name, limit=60), room, kind=machine.kind)
        device = f"{name} · {size}" if name else size
        return cells.row(parts, [(device, cells.DIM)], width)

    def _show_page(self, index: int) -> None:
        self._page = index
        self.query_one(ContentSwitcher).current = f"page-{STEPS[index]}"
        if index == len(STEPS) - 1 and not self._told_ready:
            self._told_ready = True
            self.app.ready()
        self.redraw()
        self.page.enter()

    def _refresh_page(self) -> None:
        page = self.page
        if isinstance(page, NumbersPage):
            page.use(self.run)
        elif isinstance(page, GoPage):
            page.refresh_summary()
        elif isinstance(page, DataPage):
            page.show()

    def _keep_draft(self) -> None:
        if self._changed and not self.demo:
            self.desk.save_draft(self.run)

    def _go(self) -> None:
        found = problems(self.run)
        if found:
            self._show_problems(found)
        elif self._start is None:
            self._show_problems([Problem("", "nothing here can start a run", "use the command above")])
        else:
            self.starting, self._given_up = True, False
            self._say("checking the run …")
            self._start_run(self.run)

    @work(thread=True, group="start", exit_on_error=False)
    def _start_run(self, run: RunConfig) -> None:
        reading = Reading(lambda share, text: self.app.call_from_thread(self._say, text), self._go_on_starting)
        folder, found = begun(self._start, run, reading) if self._start else (None, [])
        self.app.call_from_thread(self._started, folder, found)

    def _go_on_starting(self) -> None:
        if self.stop_at_start or self._given_up:
            raise Stopped("the start was given up; nothing was begun")

    def _started(self, folder: Path | None, found: list[Problem]) -> None:
        self.starting = False
        if folder is None:
            self._show_problems(found)
            if self.stop_at_start:
                self.app.action_leave()
            return
        if not self.demo:
            self.desk.drop_draft()
        self.app.show_run(folder, stop=self.stop_at_start)

    def _say(self, news: str) -> None:
        self.query_one(GoPage).say(news)

    def _show_problems(self, found: list[Problem]) -> None:
        self.query_one(GoPage).show_problems(found)
