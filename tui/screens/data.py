"""The data page: name the data, see what they hold, and which rows cannot be used."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.timer import Timer
from textual.widgets import Input, Static
from textual.worker import get_current_worker

from qlora_tui.engine.errors import Stopped
from qlora_tui.engine.spec import DEMO_DATA, KEYS, RunConfig
from qlora_tui.tui import filters
from qlora_tui.tui.datalook import DataLook
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.cells import Part
from qlora_tui.tui.scoring import known_words
from qlora_tui.tui.screens.keys import bindings
from qlora_tui.tui.screens.line import Line, PathSuggester, complete
from qlora_tui.tui.screens.pages import Page
from qlora_tui.tui.screens.rows import RowsScreen
from qlora_tui.tui.screens.xray import found_lines, reading_line

if TYPE_CHECKING:
    from qlora_tui.tui.screens.wizard import WizardScreen

_PAUSE = 0.3


class DataPage(Page):
    """One line for the data; beneath it what is in them: format, faults by row, lengths, what is trained, copies."""

    title = "data"
    place = "data page"
    types = True
    BINDINGS: ClassVar[list[BindingType]] = bindings("data page")

    def __init__(self, wizard: WizardScreen) -> None:
        """Start without having looked at anything."""
        super().__init__(wizard)
        self._timer: Timer | None = None
        self._busy: tuple[str, ...] = ()
        self._going_on = False
        self._read_bytes = (0, 0)

    def on_mount(self) -> None:
        """Tell four times a second how far the reading is: the reading itself never waits for the screen."""
        self.set_interval(0.25, self._tell_progress)

    def _tell_progress(self) -> None:
        if self._busy and self._look is None and self.wizard.page is self:
            self.show()

    def compose(self) -> ComposeResult:
        """Lay out the line and what is found behind it."""
        yield Static("What should it learn from? A JSONL file or a hub dataset.", markup=False, classes="question")
        yield Line(
            placeholder="such as my-chats.jsonl (tab completes), or builtin:python-docs",
            id="data-name",
            suggester=PathSuggester(DEMO_DATA),
            compact=True,
        )
        with VerticalScroll(can_focus=False, id="data-scroll"):
            yield Static("", markup=False, id="data-found")

    def enter(self) -> None:
        """Show the run's data and take the focus."""
        box = self.query_one("#data-name", Input)
        box.value = ", ".join(self.wizard.run.data)
        box.cursor_position = len(box.value)
        box.focus()
        self.show()
        self._look_soon()

    def commit(self) -> bool:
        """Go on once the data have been looked at and hold rows that can be used."""
        look = self._look
        if not self.wizard.run.data:
            self._tell([("✖ name the data", cells.BAD)])
            return False
        if look is None or look.problem:
            self._going_on = True
            if look is not None:  # a file may have come meanwhile: look again; a reading under way goes on
                self._busy = ()
            self._look_now()
            return False
        blocked = bool(look.problem) or look.unwritable or (look.refused > 0 and not self.wizard.run.skip_bad_rows)
        if blocked:
            self.show()
        return not blocked

    def action_skip_bad(self) -> None:
        """Decide to go on without broken rows, or take that back."""
        self.wizard.change(dataclasses.replace(self.wizard.run, skip_bad_rows=not self.wizard.run.skip_bad_rows))
        self.show()

    def action_complete(self) -> None:
        """Take the suggested path."""
        box = self.query_one("#data-name", Input)
        found = complete(box.value, DEMO_DATA)
        if found:
            box.value = found
            box.cursor_position = len(found)

    def action_scroll(self, pages: int) -> None:
        """Scroll what does not fit beneath the line."""
        scroll = self.query_one("#data-scroll", VerticalScroll)
        scroll.scroll_relative(y=pages * max(1, scroll.size.height - 1), animate=False)

    def action_rows(self) -> None:
        """Show the rows as they will be trained."""
        look = self._look
        if look is None or look.problem:
            told = "there is no row to show" if look or not self.wizard.run.data else "rows are shown once the data have been read"
            self.app.notify(told, timeout=3, markup=False)
            return
        self.app.push_screen(RowsScreen(self.wizard.desk, self.wizard.run, ascii_only=self.wizard.ascii_only))

    def action_triage(self) -> None:
        """Show what the base already knows."""
        look = self._look
        if look is None or look.problem:
            told = "there is no answer to score" if look or not self.wizard.run.data else "answers are scored once the data have been read"
            self.app.notify(told, timeout=3, markup=False)
            return
        from qlora_tui.tui.screens.triage import TriageScreen  # it needs the room of data, which nobody waits for before this

        self.app.push_screen(TriageScreen(self.wizard), lambda _: self.show())

    def action_too_long(self) -> None:
        """Choose what becomes of rows that are too long."""
        self._next_of("too_long", self.wizard.run.too_long)

    def action_copies(self) -> None:
        """Choose which copies of earlier rows are left out."""
        self._next_of("filter_duplicates", self.wizard.run.filter_duplicates)

    def _next_of(self, name: str, now: str) -> None:
        """Take the choice after `now` of the key `name`."""
        choices = KEYS[name].choices
        values = {name: choices[(choices.index(now) + 1) % len(choices)]}
        self.wizard.change(dataclasses.replace(self.wizard.run, **values))  # type: ignore[arg-type]  # a choice of the table
        self.show()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer to go on without broken rows only where there are any."""
        if action == "skip_bad":
            look = self._look
            return look is not None and look.refused > 0 and not look.problem
        return True

    @property
    def _look(self) -> DataLook | None:
        return self.wizard.data_of_run()

    @on(Input.Changed, "#data-name")
    def _typed_in(self, event: Input.Changed) -> None:
        event.stop()
        names = tuple(part.strip() for part in event.value.split(",") if part.strip())
        if names == self.wizard.run.data:
            return
        self._going_on = False
        self._busy = ()
        self.workers.cancel_group(self, "data")  # nobody waits for the data named before
        self.wizard.change(dataclasses.replace(self.wizard.run, data=names))
        self.show()
        self._look_soon()

    def read_ahead(self) -> None:
        """Read the data while the person is still on earlier pages: times follow from them."""
        if self.wizard.run.data and self._look is None:
            self._look_now()

    def _look_soon(self) -> None:
        """Look once the person pauses, not at every key: a file may be large."""
        if self._timer is not None:
            self._timer.stop()
        if self.wizard.run.data and self._look is None:
            self._timer = self.set_timer(_PAUSE, self._look_now)

    def _look_now(self) -> None:
        """Read, unless that is under way or was done well: the pause after a page opens may outlast what was read ahead."""
        run, look = self.wizard.run, self._look
        if self._busy != run.data and (look is None or look.problem):
            self._busy = run.data
            self._read_bytes = (0, 0)
            self.show()
            self._read(run)

    @work(thread=True, group="data", exclusive=True, exit_on_error=False)
    def _read(self, run: RunConfig) -> None:
        worker = get_current_worker()

        def progress(done: int, total: int) -> None:
            if not worker.is_cancelled:
                self._read_bytes = (done, total)

        try:
            look = self.wizard.desk.look_at_data(run, progress)
        except Stopped:
            return
        except Exception as error:  # noqa: BLE001  a library's error is the person's to read, not the screen's to die of
            look = DataLook(run.data, problem=f"{type(error).__name__}: {error}")
        if not worker.is_cancelled:
            self.app.call_from_thread(self._have, look)

    def _have(self, look: DataLook) -> None:
        if look.names != self.wizard.run.data:
            return
        self._busy = ()
        self.wizard.use_data(look)
        self.show()
        self.refresh_bindings()
        going_on, self._going_on = self._going_on, False
        if going_on and not look.problem:
            self.wizard.action_next()

    def refresh_run(self, *, anew: bool = False) -> None:
        """Draw again: something became known."""
        self.show()

    def show(self) -> None:
        """Draw what was found, or that it is being looked for."""
        look, width = self._look, max(20, self.query_one("#data-scroll").scrollable_content_region.width - 2)
        self.query_one(".question").display = look is None  # its line is needed once there is something to tell
        if look is None:
            reading = self._busy and self._busy == self.wizard.run.data
            self._put([reading_line(*self._read_bytes, width)] if reading else [])
            return
        run, desk, outlook = self.wizard.run, self.wizard.desk, self.wizard.outlook
        cost, known = desk.limit_cost(run, outlook, look.lengths), known_words(run, desk.scored(run))
        left_out = filters.known(look, run, desk.scored(run))
        known += f"; {left_out.words()}" if left_out.rows else ""
        self._put(found_lines(look, run, width, self._room(), cost, outlook, known))

    def on_resize(self) -> None:
        """Draw again: how much is told depends on the room."""
        self.show()

    def _room(self) -> int:
        """Return the lines beneath the line to type in."""
        return max(1, self.query_one("#data-scroll").size.height)

    def _put(self, lines: list[Content]) -> None:
        self.query_one("#data-found", Static).update(self.text(cells.stack(lines)))

    def _tell(self, parts: list[Part]) -> None:
        self._put([cells.assemble(parts)])
