"""The first page: what do you want? The answer is a ready-made run that fits this card.

Two questions, one list: the goal, then its ready-made runs, each with what it needs and takes here; the one that fits
this card best comes first. An unfinished run and what the command line says are offered before anything else.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.content import Content
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from qlora_tui.engine import units
from qlora_tui.engine.preset import GOALS, Goal
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.text import one_line
from qlora_tui.tui import words
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.budgetbar import badge
from qlora_tui.tui.panels.cells import Part
from qlora_tui.tui.screens.desk import Desk, Ready
from qlora_tui.tui.screens.keys import bindings
from qlora_tui.tui.screens.pages import Page

if TYPE_CHECKING:
    from qlora_tui.tui.screens.wizard import WizardScreen

_QUESTION = "What do you want?"
_ONE_SIZE = 1.08  # cards that are sold as one size differ by so much
_GATED = "▲ needs a licence accepted on the hub, and a login"


@dataclass(frozen=True, slots=True)
class Offer:
    """Something to begin from: a run, or a goal whose ready-made runs come next."""

    title: str
    detail: str
    run: RunConfig
    preset: str = ""
    base: RunConfig | None = None
    goal: Goal | None = None


class GoalPage(Page):
    """Choose what it is for, then one of the ready-made runs for it."""

    title = "goal"
    place = "goal page"
    BINDINGS: ClassVar[list[BindingType]] = bindings("goal page")

    def __init__(self, wizard: WizardScreen, given: RunConfig | None) -> None:
        """Offer `given` first: what the command line already says."""
        super().__init__(wizard)
        self._given = given
        self._goal: Goal | None = None
        self._offers: list[Offer] = []
        self._taken: Offer | None = None
        self._ranked = False

    def compose(self) -> ComposeResult:
        """Lay out the question and the offers."""
        yield Static(_QUESTION, markup=False, classes="question", id="goal-question")
        yield OptionList(id="offers", compact=True)

    def on_mount(self) -> None:
        """Gather the first offers; what each needs is worked out after the first frame."""
        self._offers = beginnings(self.wizard.desk, self._given, demo=self.wizard.demo, ranked=False)
        self._list(sized=False)
        self.call_after_refresh(self._rank)

    def _rank(self) -> None:
        """Find what fits this card best for each goal, and say what it needs."""
        self._ranked = True
        if self._goal is None:
            self._offers = beginnings(self.wizard.desk, self._given, demo=self.wizard.demo)
            self._list()

    def on_resize(self) -> None:
        """Break the lines anew."""
        if self._offers:
            self._list(sized=self._ranked)

    def enter(self) -> None:
        """Take the focus."""
        self.query_one(OptionList).focus()

    @property
    def inside(self) -> bool:
        """Whether the goal has been chosen already."""
        return self._goal is not None

    def back(self) -> bool:
        """Ask for the goal again."""
        if self._goal is None:
            return False
        before, self._goal = self._goal, None
        self._offers = beginnings(self.wizard.desk, self._given, demo=self.wizard.demo)
        self._list(at=next((place for place, offer in enumerate(self._offers) if offer.goal == before), 0))
        return True

    def commit(self) -> bool:
        """Begin from the chosen offer; the same one again keeps what was changed on later pages."""
        offer = self._offers[self.query_one(OptionList).highlighted or 0]
        if offer.goal is not None:
            self._goal = offer.goal
            self._offers = ready_made(self.wizard.desk, offer.goal)
            self._list(at=next((place for place, one in enumerate(self._offers) if one == self._taken), 0))
            return False
        if offer != self._taken:
            self._taken = offer
            self.wizard.begin(offer.run, offer.preset, offer.base)
        return True

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        """Show at once what the highlighted offer would need; what was changed on later pages is kept until another is taken."""
        if self._ranked and event.option_index < len(self._offers) and self.wizard.page is self:
            offer = self._offers[event.option_index]
            self.wizard.preview(None if offer == self._taken else offer.run)

    def _list(self, *, at: int | None = None, sized: bool = True) -> None:
        """Show the offers; without `sized` none says what it needs, which takes some milliseconds each."""
        listed = self.query_one(OptionList)
        place = listed.highlighted if at is None else at
        question = f"{self._goal.title.capitalize()}: what fits this card best comes first." if self._goal else _QUESTION
        self.query_one("#goal-question", Static).update(self.text(Content(question)))
        width = max(30, self.wizard.size.width - 6)
        lines = [
            self._goal_line(offer, width, sized=sized) if offer.preset == "" else self._run_lines(offer, width) for offer in self._offers
        ]
        listed.clear_options()
        listed.add_options([Option(self.text(line)) for line in lines])
        listed.highlighted = min(place or 0, len(lines) - 1)
        self.wizard.redraw_keys()

    def _goal_line(self, offer: Offer, width: int, *, sized: bool) -> Content:
        """Return a line or two: what it is for, and the model that fits best with what it needs."""
        outlook = self.wizard.desk.outlook(offer.run) if sized and offer.run.model_name_or_path else None
        right: list[Part] = []
        if outlook is not None:
            name = one_line(offer.run.model_name_or_path, limit=60).rsplit("/", 1)[-1] if offer.goal and width >= 70 else ""
            right = [(f"{name}  ", cells.DIM), badge(outlook.budget)]
        head = cells.row([(one_line(offer.title, limit=60), "bold")], right, width)
        return cells.stack([head, cells.assemble([(f"  {one_line(offer.detail, limit=200)}", cells.DIM)]).truncate(width, ellipsis=True)])

    def _run_lines(self, offer: Offer, width: int) -> Content:
        """Return what a ready-made run is, what it needs and takes here, and why one would take it."""
        desk = self.wizard.desk
        outlook, spec = desk.outlook(offer.run), desk.model(offer.run)
        mark = [badge(outlook.budget)] if outlook else []
        lines = [cells.row([(one_line(offer.title, limit=60), "bold")], mark, width)]
        if outlook is not None and spec is not None:
            facts = [units.billions(spec.params), words.gib(outlook.budget.total_bytes)]
            if outlook.typical is not None:
                low, mid, high = outlook.typical.total_seconds
                told = f"{words.duration(mid)} ({words.span(low, high)}) for "
                facts.append(told + (outlook.assumed if width >= 70 else outlook.assumed.split(" of ")[0]))
            lines += [Content.styled(f"  {line}", cells.MAIN) for line in textwrap.wrap(" · ".join(facts), width - 2)]
        if desk.gated(offer.run):
            lines.append(Content.styled(f"  {_GATED}", cells.WARN))
        why = textwrap.wrap(one_line(offer.detail, limit=300), width - 2)
        return cells.stack([*lines, *[Content.styled(f"  {line}", cells.DIM) for line in why]])


def beginnings(desk: Desk, given: RunConfig | None, *, demo: bool, ranked: bool = True) -> list[Offer]:
    """Return what one can begin from: what is there already, then the goals; a demo has one beginning.

    Unless `ranked` a goal stands for any of its ready-made runs, since the best takes some milliseconds to find.
    """
    ready = desk.presets()
    if demo:
        found = next((one for one in ready if one.name == "demo"), None)
        run = given or (found.run if found else RunConfig())
        return [Offer("demo", found.why if found else "a small model and real rows", run, "demo", found.run if found else None)]
    offers = []
    if given is not None and given != RunConfig():
        offers.append(Offer("as you said on the command line", _words(given), given))
    kept = desk.load_draft()
    if kept is not None:
        offers.append(Offer("go on where you left off", _words(kept), kept))
    small = desk.machine().kind == "cpu"  # without a graphics card all but the demo take days
    for goal in sorted(GOALS, key=lambda goal: small and goal.name != "try"):
        those = [one for one in ready if one.goal == goal.name]
        best = next(iter(best_first(desk, those) if ranked else those), None)
        if best is not None:
            offers.append(Offer(goal.title, goal.detail, best.run, goal=goal))
    offers.append(Offer("something else", "start from the defaults and choose everything yourself", RunConfig()))
    return offers


def ready_made(desk: Desk, goal: Goal) -> list[Offer]:
    """Return the ready-made runs for `goal`, the one that fits this card best first."""
    found = best_first(desk, [one for one in desk.presets() if one.goal == goal.name])
    return [Offer(one.title or one.name, one.why, one.run, one.name, one.run) for one in found]


def best_first(desk: Desk, ready: Sequence[Ready]) -> list[Ready]:
    """Return ready-made runs ordered by how well they fit this card.

    First those that fit with room for the estimate's error, then those that only just fit. Of these, those made for a
    card no larger than this one, the largest card first, then the larger model: a run made for a larger card may fit, but
    not in comfort. Without a card the smallest model comes first, since the others take days.
    """
    here = desk.machine()

    def rank(one: Ready) -> tuple[bool, bool, bool, int, int, str]:
        outlook, spec, wants = desk.outlook(one.run), desk.model(one.run), desk.card_bytes(one.card)
        fits, tight = (outlook.budget.fits, outlook.budget.tight) if outlook else (False, False)
        params = spec.params if spec else 0
        if here.kind == "cpu":
            return (not fits, tight, False, params, 0, one.name)
        larger = wants > here.total_bytes * _ONE_SIZE
        return (not fits, tight, larger, wants if larger else -wants, -params, one.name)

    return sorted(ready, key=rank)


def _words(run: RunConfig) -> str:
    model = run.model_name_or_path or "no model yet"
    return f"{model}, {', '.join(run.data) or 'no data yet'}, rank {run.lora_r}, {run.max_length} tokens"
