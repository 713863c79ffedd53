"""The wizard: five pages that change one run, with its cost at the foot of every page.

Nothing is lost by going back, by an error at the start, or by leaving: an unfinished run is kept as a draft and
offered the next time (never for a demo). What takes time is elsewhere: tokens are counted in `counting`, the test run
and the start are in `launch`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.content import Content
from textual.dom import DOMNode
from textual.widgets import ContentSwitcher, Static

from qlora_tui.engine.errors import Problem
from qlora_tui.engine.fixes import Fix
from qlora_tui.engine.spec import RunConfig, from_values, values_of
from qlora_tui.engine.text import one_line
from qlora_tui.tui import words
from qlora_tui.tui.datalook import DataLook
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.budgetbar import draw_outlook, in_few_words
from qlora_tui.tui.panels.cells import Part
from qlora_tui.tui.reading import Reading
from qlora_tui.tui.screens.command import equivalent
from qlora_tui.tui.screens.counting import Counting
from qlora_tui.tui.screens.data import DataPage
from qlora_tui.tui.screens.desk import Desk, Outlook
from qlora_tui.tui.screens.dialogs import HelpDialog
from qlora_tui.tui.screens.fixlist import FixList
from qlora_tui.tui.screens.go import GoPage
from qlora_tui.tui.screens.goal import GoalPage
from qlora_tui.tui.screens.keys import KeyedScreen, KeyLine, bindings, help_of
from qlora_tui.tui.screens.launch import Start, TestRun
from qlora_tui.tui.screens.model import ModelPage
from qlora_tui.tui.screens.numbers import NumbersPage
from qlora_tui.tui.screens.pages import Page
from qlora_tui.tui.screens.undo import Undo

if TYPE_CHECKING:
    from qlora_tui.tui.app import TunerApp

STEPS = ("goal", "model", "data", "numbers", "go")
_TALL_BAR = 22
"""Lines of the screen from which the memory bar gets all of its five."""
_KEPT_EVERY = 2.0
"""Seconds after which a changed run is written down: a lost terminal or a killed process loses no more."""


class WizardScreen(KeyedScreen):
    """Goal, model, data, numbers, go."""

    app: TunerApp

    HORIZONTAL_BREAKPOINTS = [(0, "-tiny"), (40, "-narrow"), (60, "-normal"), (110, "-wide")]  # noqa: RUF012  Textual declares it without ClassVar
    VERTICAL_BREAKPOINTS = [(0, "-bare"), (12, "-flat"), (14, "-short"), (22, "-usual"), (32, "-tall")]  # noqa: RUF012
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
        self.outlook: Outlook | None = None
        self.remedies: list[Fix] = []
        self.undone = Undo()
        self.stop_at_start = False
        self._given = given
        self._seen: RunConfig | None = None
        self._preset = "demo" if demo else ""
        self._preset_run: RunConfig | None = None
        self._page = 0
        self._unsaved = False
        self._told_ready = False
        self._keys: tuple[object, ...] = ()
        self._counting = Counting(self)
        self._test_run, self._launch = TestRun(self), Start(self, start)

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
        self.set_interval(_KEPT_EVERY, self.keep_draft)

    def on_resize(self) -> None:
        """Draw again for the new size."""
        self.redraw()

    def on_unmount(self) -> None:
        """End a test run with the screen that asked for it, and keep what was not finished."""
        self._test_run.stop()
        self.keep_draft()

    @property
    def page(self) -> Page:
        """Return the page in sight."""
        return self.query_one(f"#page-{STEPS[self._page]}", Page)

    @property
    def preset(self) -> str:
        """Return the ready-made run that this one began from, or nothing."""
        return self._preset

    @property
    def starting(self) -> bool:
        """Whether a run is being checked or begun."""
        return self._launch.running

    @property
    def probing(self) -> bool:
        """Whether a test run is under way."""
        return self._test_run.running

    def begin(self, run: RunConfig, preset: str, base: RunConfig | None) -> None:
        """Start over from `run`; `base` is what the ready-made run called `preset` says, if it came from one."""
        self._preset, self._preset_run = preset, base
        self._unsaved = False
        self.undone.forget()
        self._use(run)
        self.query_one(DataPage).read_ahead()

    def preview(self, run: RunConfig | None) -> None:
        """Show at the foot what `run` would need without taking it; None: the run itself again."""
        if run != self._seen:
            self._seen = run
            self.redraw()

    def change(self, run: RunConfig) -> None:
        """Take a changed run and show its cost at once."""
        if run != self.run:
            self._unsaved = True
            self._use(run)

    def edit(self, run: RunConfig, group: str = "") -> None:
        """Take a change that can be taken back; those of one `group` are one."""
        self.undone.note(self.run, run, group)
        self.change(run)

    def use_data(self, look: DataLook) -> None:
        """Remember what the data hold; times follow from it."""
        self._counting.use(look)
        self.redraw()
        self._counting.begin()

    def data_of_run(self) -> DataLook | None:
        """Return what the run's data hold, with rows counted by the model's own tokenizer where that was done."""
        return self._counting.of(self.run)

    def command(self) -> str:
        """Return the command that does the same without screens."""
        return equivalent(self.run, preset=self._preset, base=self._preset_run)

    def action_next(self) -> None:
        """Go on, or start the run on the last page."""
        if self.starting or self.probing or not self.page.commit():
            return
        self.keep_draft()
        if self._page == len(STEPS) - 1:
            self._launch.begin()
        else:
            self._show_page(self._page + 1)

    def action_previous(self) -> None:
        """Go one page back, or give up the start that is under way."""
        if self.starting:
            self._launch.give_up()
        elif not self.page.back() and self._page > 0:
            self._show_page(self._page - 1)

    def action_fixes(self) -> None:
        """Open the list of what to change."""
        if self.remedies and not self.starting:
            self.app.push_screen(FixList(self))

    def apply(self, fix: Fix) -> None:
        """Make the change that `fix` offers."""
        self.edit(from_values(values_of(self.run) | dict(fix.values)))
        self.refresh_page(anew=True)

    def action_undo(self) -> None:
        """Take the last change back, or first what was typed and is no value."""
        if self.page.half_typed:
            self.page.drop_typing()
        elif self.undone and not self.starting:
            self.change(self.undone.back(self.run))
            self.refresh_page(anew=True)

    def action_more(self) -> None:
        """Fold the rarer settings out, or in again."""
        self.query_one(NumbersPage).fold()

    def action_probe(self) -> None:
        """Make the test run, or end the one under way."""
        if not self.starting:
            self._test_run.begin()

    def action_queue(self) -> None:
        """Put the run into the queue instead of starting it."""
        if not self.starting and not self.probing and self.page.commit():
            self._launch.begin(queue=True)

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
        here = STEPS[self._page]
        if action in ("copy", "probe", "queue"):
            return here == "go"
        if action == "more":
            return here == "numbers"
        if action == "fixes":
            return bool(self.remedies) and here in ("numbers", "go")
        if action == "undo":
            return (bool(self.undone) or self.page.half_typed) and here in ("numbers", "go")
        if action == "previous":
            return self._page > 0 or self.page.inside
        if action == "text_help":
            return self.page.types
        return True

    def redraw(self) -> None:
        """Draw the steps and the bar for the run as it is, or for the one that is only looked at."""
        if not self.is_mounted:
            return
        run = self._seen or self.run
        look = self._counting.of(run)
        self.outlook = self.desk.outlook(run, look)
        self.remedies = self.desk.remedies(run, look) if self.outlook else []
        width = max(20, self.size.width - 2)
        waiting = ""
        if run.model_name_or_path and self.outlook is None:
            waiting = "the size of this model is not known yet: enter looks it up"
        key = "f" if self.check_action("fixes", ()) else ""
        advice = self.remedies[0] if self.remedies else None
        bar = draw_outlook(
            self.outlook,
            advice,
            width,
            now=time.time(),
            waiting=waiting,
            no_time=self._no_time(look),
            key=key,
            room=5 if self.size.height >= _TALL_BAR else 3,
        )
        self._put("#outlook", bar)
        self._put("#few", in_few_words(STEPS[self._page], self._page + 1, self.run, self.outlook, width))
        self._put("#steps", self._steps(width))
        self.redraw_keys()

    def redraw_keys(self) -> None:
        """Draw the keys at the foot again where others do something now."""
        keys = tuple(self.check_action(name, ()) for name in ("fixes", "undo", "previous"))
        if (self._page, *keys) != self._keys:
            self._keys = (self._page, *keys)
            self.refresh_bindings()

    def _no_time(self, look: DataLook | None) -> str:
        if not self.run.data:
            return "name the data to see how long it takes"
        return "known once the data have been read" if look is None else "these data cannot be used"

    def _use(self, run: RunConfig) -> None:
        if run.data != self.run.data:
            self._counting.stop()
        self.run, self._seen = run, None
        self.redraw()
        self._counting.begin()

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
        self._page, self._seen = index, None
        self.query_one(ContentSwitcher).current = f"page-{STEPS[index]}"
        if index == len(STEPS) - 1 and not self._told_ready:
            self._told_ready = True
            self.app.ready()
        self.redraw()
        self.page.enter()

    def refresh_page(self, *, anew: bool = False) -> None:
        """Show the run on the page in sight; `anew`: over what is being typed too."""
        self.page.refresh_run(anew=anew)

    def refresh_all(self) -> None:
        """Draw everything again: something became known."""
        self.redraw()
        self.refresh_page()

    def keep_draft(self) -> None:
        """Write an unfinished run down for the next time, where it was changed since."""
        if self._unsaved and not self.demo and not self._launch.began:
            self._unsaved = False
            self.desk.save_draft(self.run)

    def drop_draft(self) -> None:
        """Forget the draft: the run has begun."""
        if not self.demo:
            self.desk.drop_draft()

    def say(self, news: str) -> None:
        """Show on the last page what is happening."""
        self.query_one(GoPage).say(news)

    def show_problems(self, found: list[Problem]) -> None:
        """List on the last page what is wrong."""
        self.query_one(GoPage).show_problems(found)
