"""The model page: what is on this disk, what can be fetched, or any folder or hub id typed in."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.content import Content
from textual.timer import Timer
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from qlora_tui.engine import units
from qlora_tui.engine.budget import Budget
from qlora_tui.engine.errors import EngineError
from qlora_tui.engine.places import is_folder, is_here
from qlora_tui.engine.spec import BUILTIN, DEMO_MODEL, RunConfig
from qlora_tui.engine.text import one_line
from qlora_tui.tui import words
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.budgetbar import badge
from qlora_tui.tui.panels.cells import Part
from qlora_tui.tui.screens.keys import bindings
from qlora_tui.tui.screens.line import Line, PathSuggester
from qlora_tui.tui.screens.pages import Page
from qlora_tui.tui.screens.shelves import ModelChoice

if TYPE_CHECKING:
    from qlora_tui.tui.screens.wizard import WizardScreen

_PAUSE = 0.3
_NOTED = 76
"""Width of the screen from which there is room for a note on each model."""


class ModelPage(Page):
    """A line to type in, and a list that it filters; the arrows move in the list while one types."""

    title = "model"
    place = "model page"
    types = True
    BINDINGS: ClassVar[list[BindingType]] = bindings("model page")

    def __init__(self, wizard: WizardScreen) -> None:
        """Start without a list; it is read on a thread."""
        super().__init__(wizard)
        self._choices: list[ModelChoice] = []
        self._shown: list[ModelChoice] = []
        self._failed = ""
        self._moved = False
        self._entered_with = ""
        self._looking = ""
        self._timer: Timer | None = None
        self._scanned = ""
        self._fits: dict[str, Budget | None] = {}
        self._weighed: RunConfig | None = None

    def compose(self) -> ComposeResult:
        """Lay out the line and the list."""
        yield Static("Which model? Type a folder or a hub id, or pick one.", markup=False, classes="question")
        yield Line(
            placeholder="such as Qwen/Qwen3-4B or ./my-model (tab completes)",
            id="model-name",
            suggester=PathSuggester(DEMO_MODEL, folders=True),
            compact=True,
        )
        yield Static("", markup=False, id="model-fault", classes="fault")
        models = OptionList(id="models", compact=True)
        models.can_focus = False
        yield models

    def enter(self) -> None:
        """Show the run's model and take the focus."""
        self._moved = False
        self._entered_with = self.wizard.run.model_name_or_path
        box = self.query_one("#model-name", Input)
        box.value = self._entered_with
        box.cursor_position = len(box.value)
        box.focus()
        self._fill()
        if not self._choices:
            self._gather()
        else:
            self._weigh_soon()

    def commit(self) -> bool:
        """Take the typed or the picked model; one that is not known yet is looked up first, on a thread."""
        name = self._named()
        if not name:
            self._say("name a model: a folder, a hub id, or one of the list")
            return False
        run = dataclasses.replace(self.wizard.run, model_name_or_path=name)
        if self.wizard.desk.model(run) is not None:
            self._say("")
            self.wizard.change(run)
            return True
        if self._looking != name:
            self._looking = name
            self._say("", f"looking for {one_line(name, limit=80)} …")
            self._look_up(name, run.revision)
        return False

    def action_move(self, lines: int) -> None:
        """Move in the list while the line keeps the focus."""
        listed = self.query_one(OptionList)
        if not listed.option_count:
            return
        at = listed.highlighted
        listed.highlighted = max(0, min(listed.option_count - 1, (at + lines) if at is not None else 0))
        self._moved = True
        self._preview()

    @on(Input.Changed, "#model-name")
    def _typed_in(self, event: Input.Changed) -> None:
        event.stop()
        self._moved = False
        self._say("")
        self._fill()
        self._preview()
        self._scan_soon(event.value.strip())

    def action_complete(self) -> None:
        """Take the suggested path."""
        self.query_one("#model-name", Input).action_cursor_right()

    @on(OptionList.OptionSelected, "#models")
    def _clicked(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self._moved = True
        self.query_one(OptionList).highlighted = event.option_index
        self._preview()

    def _named(self) -> str:
        """Return the model meant: the one moved to, else what is typed, else the only match."""
        typed = self.query_one("#model-name", Input).value.strip()
        picked = self._picked
        if self._moved and picked:
            return picked
        exact = any(choice.name == typed for choice in self._choices) or typed.startswith(BUILTIN)
        if exact or not picked or "/" in typed or is_here(typed):
            return typed
        return picked

    @property
    def _picked(self) -> str:
        """Return the model that the list stands on."""
        at = self.query_one(OptionList).highlighted
        return self._shown[at].name if at is not None and at < len(self._shown) else ""

    def _preview(self) -> None:
        name = self._named()
        if name != self.wizard.run.model_name_or_path:
            self.wizard.change(dataclasses.replace(self.wizard.run, model_name_or_path=name))

    @work(thread=True, group="models", exclusive=True, exit_on_error=False)
    def _gather(self) -> None:
        found = self.wizard.desk.models()
        self.app.call_from_thread(self._have, found)

    def _have(self, found: list[ModelChoice]) -> None:
        named = self._entered_with
        spec = self.wizard.desk.model(dataclasses.replace(self.wizard.run, model_name_or_path=named)) if named else None
        if spec is not None and all(choice.name != named for choice in found):
            found = [ModelChoice(named, spec, "chosen"), *found]
        self._choices = found
        self._fill()
        self._weigh_soon()

    def _scan_soon(self, typed: str) -> None:
        """Look for models under a typed folder once the person pauses."""
        if self._timer is not None:
            self._timer.stop()
        if typed.startswith(("/", ".", "~")) and typed != self._scanned:
            self._timer = self.set_timer(_PAUSE, lambda: self._scan(typed))

    @work(thread=True, group="folders", exclusive=True, exit_on_error=False)
    def _scan(self, typed: str) -> None:
        where = typed if is_folder(typed) else str(Path(typed).parent)
        found = self.wizard.desk.folders(where)
        self.app.call_from_thread(self._scanned_folder, typed, found)

    def _scanned_folder(self, typed: str, found: list[ModelChoice]) -> None:
        self._scanned = typed
        known = {choice.name for choice in self._choices}
        fresh = [choice for choice in found if choice.name not in known]
        if fresh:
            self._choices = [*fresh, *self._choices]
            self._fill()
            self._weighed = None
            self._weigh_soon()

    def _weigh_soon(self) -> None:
        """Work out on a thread what each model needs, once for each setting of the rest."""
        run = dataclasses.replace(self.wizard.run, model_name_or_path="")
        if run != self._weighed:
            self._weighed = run
            self._weigh(run, [choice.name for choice in self._choices])

    @work(thread=True, group="weigh", exclusive=True, exit_on_error=False)
    def _weigh(self, run: RunConfig, names: list[str]) -> None:
        fits = {name: self.wizard.desk.least(dataclasses.replace(run, model_name_or_path=name)) for name in names}
        self.app.call_from_thread(self._have_fits, run, fits)

    def _have_fits(self, run: RunConfig, fits: dict[str, Budget | None]) -> None:
        if run == self._weighed:
            self._fits = fits
            self._fill()

    @work(thread=True, group="look-up", exclusive=True, exit_on_error=False)
    def _look_up(self, name: str, revision: str) -> None:
        problem = ""
        try:
            self.wizard.desk.look_up(name, revision)
        except EngineError as error:
            problem = str(error.problem)
        except Exception as error:  # noqa: BLE001  a library's error is the person's to read, not the screen's to die of
            problem = f"{type(error).__name__}: {error}"
        self.app.call_from_thread(self._looked_up, name, problem)

    def _looked_up(self, name: str, problem: str) -> None:
        self._looking = ""
        if name != self._named():
            return
        self._say(problem)
        self.wizard.change(dataclasses.replace(self.wizard.run, model_name_or_path=name))
        if not problem:
            self.wizard.action_next()

    def _fill(self) -> None:
        """List every model until something is typed, then those whose name holds it."""
        box = self.query_one("#model-name", Input).value
        typed = box.strip().casefold()
        everything = box == self._entered_with or any(choice.name.casefold() == typed for choice in self._choices)
        before = self._picked if self._moved else ""
        self._shown = [choice for choice in self._choices if everything or typed in choice.name.casefold()]
        listed = self.query_one(OptionList)
        listed.clear_options()
        listed.add_options([Option(self.text(self._line(choice))) for choice in self._shown])
        at = next((index for index, choice in enumerate(self._shown) if choice.name.casefold() == typed), None)
        guess = bool(self._shown) and bool(typed) and not everything and "/" not in typed  # with a slash it is a whole name
        moved = next((index for index, choice in enumerate(self._shown) if choice.name == before), None)
        listed.highlighted = moved if moved is not None else at if at is not None else 0 if guess else None
        if not self._looking:
            self._say("")

    def _head(self) -> str:
        """Return what stands above the columns of the list."""
        room = self._room()
        return f" {'':<{room}} {'size':>6} {'at least':>9}" if self._shown else ""

    def _room(self) -> int:
        width = self.wizard.size.width
        return 43 if width >= 98 else 35 if width >= _NOTED else max(12, width - 38)

    def _line(self, choice: ModelChoice) -> Content:
        budget = self._fits.get(choice.name)
        width = max(30, self.wizard.size.width - 8)
        room = self._room()
        mark = "▲ " if choice.gated and self.wizard.size.width < _NOTED else ""  # where there is no room for the note
        name = mark + one_line(choice.name)
        name = name if len(name) <= room else f"{name[: room - 1]}…"
        parts: list[Part] = [(f"{name:<{room}} ", ""), (f"{units.billions(choice.spec.params):>6}", "")]
        fits = badge(budget) if budget else ("", "")
        parts += [(f" {words.gib(budget.total_bytes) if budget else '':>9}  ", cells.DIM), (f"{fits[0]:<10}", fits[1])]
        note: Part = (choice.place + (f" · {one_line(choice.note, limit=60)}" if choice.note and width >= 90 else ""), cells.DIM)
        if choice.gated:
            note = ("▲ needs a login and its licence accepted" if width >= 90 else "▲ login", cells.WARN)
        told = [*parts, note] if self.wizard.size.width >= _NOTED else parts
        return cells.assemble(told).truncate(width, ellipsis=True)

    def _say(self, fault: str, news: str = "") -> None:
        line = [(f"✖ {one_line(fault, limit=300)}", cells.BAD)] if fault else [(news or self._head(), cells.DIM)]
        self.query_one("#model-fault", Static).update(self.text(cells.assemble(line)))
