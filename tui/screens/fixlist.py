"""The list behind `f`: what to change so that the run fits, or is faster where there is room; ranked, each with its cost.

A number takes the change, `u` gives it back, and the memory bar beneath follows: the list covers all but the bar.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from qlora_tui.engine.fixes import Fix
from qlora_tui.engine.text import one_line
from qlora_tui.tui import words
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.budgetbar import badge
from qlora_tui.tui.screens.keys import bindings

if TYPE_CHECKING:
    from qlora_tui.tui.screens.wizard import WizardScreen


class FixList(ModalScreen[None]):
    """Up to five changes; each says what it saves, and what it costs in time and quality."""

    VERTICAL_BREAKPOINTS = [(0, "-flat"), (16, "-short"), (30, "-usual")]  # noqa: RUF012  Textual declares it without ClassVar
    BINDINGS: ClassVar[list[BindingType]] = bindings("fix list")

    def __init__(self, wizard: WizardScreen) -> None:
        """List what the wizard's run could change."""
        super().__init__()
        self._wizard = wizard
        self._taken = 0

    def compose(self) -> ComposeResult:
        """Lay out what is missing, the changes and the keys."""
        with Vertical(id="dialog"):
            yield Static("", markup=False, id="fix-title", classes="question")
            yield OptionList(id="fixes", compact=True)
            yield Static("", markup=False, id="fix-keys", classes="keys")

    def on_mount(self) -> None:
        """Fill the list."""
        self._show()

    def on_resize(self) -> None:
        """Break the lines anew."""
        self._show()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Take the one chosen with Enter or the mouse."""
        self.action_take(event.option_index)

    def action_take(self, place: int) -> None:
        """Make a change, and list what is left to change."""
        if place < len(self._wizard.remedies):
            self._taken += 1
            self._wizard.apply(self._wizard.remedies[place])
            self._show()

    def action_undo(self) -> None:
        """Give the last change back."""
        self._wizard.action_undo()
        self._taken = max(0, self._taken - 1)
        self._show()

    def _show(self) -> None:
        wizard = self._wizard
        width = max(30, min(100, self.size.width) - 12)
        listed = self.query_one(OptionList)
        listed.clear_options()
        lines = [self._lines(number, fix, width) for number, fix in enumerate(wizard.remedies, 1)]
        listed.add_options([Option(self._text(line)) for line in lines])
        listed.highlighted = 0 if lines else None
        self.query_one("#fix-title", Static).update(self._text(self._title()))
        keys = f"1-{len(lines)} or enter: take it" if lines else "nothing more to change"
        undo = f"  u: give back ({self._taken})" if self._taken else "  u: undo" if wizard.undone else ""
        self.query_one("#fix-keys", Static).update(self._text(Content(f"{keys}{undo}  esc: back")))

    def _title(self) -> Content:
        outlook = self._wizard.outlook
        if outlook is None:
            return Content("nothing to change")
        budget = outlook.budget
        what = "What to change" if not budget.fits or budget.tight else "It fits; what more room buys"
        size = f"  {words.gib(budget.total_bytes, unit=False)} of {words.gib(budget.machine.total_bytes)}  "
        return cells.assemble([(what, "bold"), (size, ""), badge(budget)])

    def _lines(self, number: int, fix: Fix, width: int) -> Content:
        """Return what to do, and beneath it what that saves and costs."""
        enough = [("● then it fits", cells.GOOD)] if fix.enough and fix.saves_bytes >= 0 else []
        what = one_line(fix.text, limit=200).split(": ", 1)[0]
        head = cells.row([(f"{number} ", f"bold {cells.MAIN}"), (what, "bold")], enough, width)
        saves = f"saves {words.size(fix.saves_bytes)}" if fix.saves_bytes >= 0 else f"takes {words.size(-fix.saves_bytes)} more"
        costs = f"{saves} · {_time(fix.time_factor)} · {one_line(fix.quality, limit=80) or 'the result stays the same'}"
        told = [Content.styled(f"    {line}", cells.DIM) for line in textwrap.wrap(costs, width - 4)]
        return cells.stack([head, *told])

    def _text(self, content: Content) -> Content:
        return cells.plain_ascii(content) if self._wizard.ascii_only else content


def _time(factor: float) -> str:
    """Return what a change does to the time, in words.

    >>> _time(1.31), _time(0.5), _time(1.01)
    ('1.3x the time', '2.0x faster', 'the same time')
    """
    if 0.95 < factor < 1.05:
        return "the same time"
    return f"{factor:.1f}x the time" if factor > 1 else f"{1 / factor:.1f}x faster"
