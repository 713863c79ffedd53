"""The form of a wizard page, and the first one: what to begin from."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.text import one_line
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.budgetbar import badge
from qlora_tui.tui.screens.desk import Desk

if TYPE_CHECKING:
    from qlora_tui.tui.screens.wizard import WizardScreen


class Page(Vertical):
    """One step of the wizard. `enter` brings it up, `commit` says whether one may go on."""

    title: ClassVar[str] = ""
    place: ClassVar[str] = "field"
    """The place in the table of actions whose keys this page adds."""
    types: ClassVar[bool] = False
    """Whether one types on this page, so that letters are no keys."""

    def __init__(self, wizard: WizardScreen) -> None:
        """Belong to `wizard`, which holds the run that all pages change."""
        super().__init__(id=f"page-{self.title}", classes="page")
        self.wizard = wizard

    def enter(self) -> None:
        """Show the run as it is now and take the focus."""

    def commit(self) -> bool:
        """Say whether the wizard may go on; a page that cannot go on shows why."""
        return True

    def text(self, content: Content) -> Content:
        """Return `content` as this terminal can show it."""
        return cells.plain_ascii(content) if self.wizard.ascii_only else content


@dataclass(frozen=True, slots=True)
class Beginning:
    """Something to begin from."""

    title: str
    detail: str
    run: RunConfig
    preset: str = ""
    base: RunConfig | None = None


class GoalPage(Page):
    """Choose a ready-made run, an unfinished one, or an empty one."""

    title = "goal"

    def __init__(self, wizard: WizardScreen, given: RunConfig | None) -> None:
        """Offer `given` first: what the command line already says."""
        super().__init__(wizard)
        self._given = given
        self._offers: list[Beginning] = []
        self._taken: int | None = None

    def compose(self) -> ComposeResult:
        """Lay out the question and the offers."""
        yield Static("What do you want to begin from?", markup=False, classes="question")
        yield OptionList(id="offers", compact=True)

    def on_mount(self) -> None:
        """Gather the offers."""
        self._offers = offers(self.wizard.desk, self._given, demo=self.wizard.demo)
        listed = self.query_one(OptionList)
        for index, offer in enumerate(self._offers):
            listed.add_option(Option(self.text(self._line(offer)), id=str(index)))
        listed.highlighted = 0

    def enter(self) -> None:
        """Take the focus."""
        self.query_one(OptionList).focus()

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        """Show at once what the highlighted offer would need."""
        if self._taken is None and event.option_index < len(self._offers):
            self.wizard.preview(self._offers[event.option_index].run)

    def commit(self) -> bool:
        """Begin from the highlighted offer; the same one again keeps what was changed on later pages."""
        chosen = self.query_one(OptionList).highlighted or 0
        if chosen != self._taken:
            offer = self._offers[chosen]
            self._taken = chosen
            self.wizard.begin(offer.run, offer.preset, offer.base)
        return True

    def _line(self, offer: Beginning) -> Content:
        outlook = self.wizard.desk.outlook(offer.run)
        mark = badge(outlook.budget) if outlook else ("", "")
        width = max(30, self.wizard.size.width - 8)
        head = cells.row([(one_line(offer.title, limit=60), "bold")], [mark], width)
        detail = textwrap.wrap(one_line(offer.detail, limit=300), width - 2)
        return cells.stack([head, *[Content.styled(f"  {line}", cells.DIM) for line in detail]])


def offers(desk: Desk, given: RunConfig | None, *, demo: bool) -> list[Beginning]:
    """Return what one can begin from, the most likely first."""
    if demo:
        ready = next((ready for ready in desk.presets() if ready.name == "demo"), None)
        run = given or (ready.run if ready else RunConfig())
        return [Beginning("demo", ready.why if ready else "a small model and real rows", run, "demo", ready.run if ready else None)]
    found = []
    if given is not None and given != RunConfig():
        found.append(Beginning("as you said on the command line", _words(given), given))
    kept = desk.load_draft()
    if kept is not None:
        found.append(Beginning("go on where you left off", _words(kept), kept))
    cpu = desk.machine().kind == "cpu"  # without a graphics card all but the demo take days
    ready_made = sorted(desk.presets(), key=lambda ready: (cpu and ready.name != "demo", not _fits(desk, ready.run)))
    found += [Beginning(ready.title or ready.name, ready.why, ready.run, ready.name, ready.run) for ready in ready_made]
    found.append(Beginning("your own", "start from the defaults and choose everything yourself", RunConfig()))
    return found


def _fits(desk: Desk, run: RunConfig) -> bool:
    outlook = desk.outlook(run)
    return outlook is not None and outlook.budget.fits


def _words(run: RunConfig) -> str:
    model = run.model_name_or_path or "no model yet"
    return f"{model}, {', '.join(run.data) or 'no data yet'}, rank {run.lora_r}, {run.max_length} tokens"
