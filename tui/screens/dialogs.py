"""Small windows over a screen: how to stop, and which keys there are."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import ClassVar, Literal

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from qlora_tui.tui.panels import cells
from qlora_tui.tui.screens.keys import bindings

Choice = Literal["stop", "detach", "abort", "cancel"]
_CHOICES: dict[Choice, tuple[str, str]] = {
    "stop": ("stop and save", "finish this step, save a checkpoint and the adapter"),
    "detach": ("leave it running", "close the screen; training goes on"),
    "abort": ("abort now", "lose what came after the last checkpoint"),
    "cancel": ("back", "change nothing"),
}


_KEY = 8
"""Cells for the keys in the help."""


class StopDialog(ModalScreen[Choice]):
    """Ask how to leave a run; the first choice is what Enter takes."""

    BINDINGS: ClassVar[list[BindingType]] = bindings("stop dialog")

    def __init__(self, *, first: Choice = "stop") -> None:
        """Offer all choices with `first` on top."""
        super().__init__()
        self._order: list[Choice] = [first, *(choice for choice in _CHOICES if choice != first)]

    def compose(self) -> ComposeResult:
        """Lay out the question and the choices."""
        with Vertical(id="dialog"):
            yield Static("This run is still training.", markup=False, classes="question")
            yield OptionList(*[Option(self._line(choice), id=choice) for choice in self._order], compact=True)
            yield Static("up/down choose   enter take   esc back", markup=False, classes="keys")

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Close with what was chosen."""
        self.dismiss(self._order[event.option_index])

    def action_choose(self, choice: Choice) -> None:
        """Close with a choice made by key."""
        self.dismiss(choice)

    def _line(self, choice: Choice) -> Content:
        name, meaning = _CHOICES[choice]
        return Content.assemble((f"{name:<18}", "bold"), (meaning, cells.DIM))


class HelpDialog(ModalScreen[None]):
    """The keys of a screen, made from the table of actions so that none can be missing."""

    BINDINGS: ClassVar[list[BindingType]] = bindings("help dialog")

    def __init__(self, keys: Sequence[tuple[str, str]], notes: Sequence[str] = ()) -> None:
        """Show `keys` as (key, what it does), then notes."""
        super().__init__()
        self._keys, self._notes = keys, notes

    def compose(self) -> ComposeResult:
        """Lay out the table."""
        width = max(20, min(76, int(self.app.size.width * 0.96)) - 7)
        lines = [line for key, meaning in self._keys for line in _told(key, meaning, width)]
        notes = [Content.styled(line, cells.DIM) for note in self._notes for line in textwrap.wrap(note, width)]
        with VerticalScroll(id="dialog"):  # it has the focus, so that arrows reach what has no room
            yield Static(Content.assemble("Keys", ("   esc closes", cells.DIM)), markup=False, classes="question")
            told = cells.stack([*lines, *([Content("")] if notes else []), *notes])
            yield Static(cells.plain_ascii(told) if self.app.has_class("-ascii") else told, markup=False)


def _told(key: str, meaning: str, width: int) -> list[Content]:
    """Return a key and what it does, with what does not fit beneath the words and not beneath the key."""
    wrapped = textwrap.wrap(meaning, max(10, width - _KEY - 2)) or [""]
    return [Content.assemble((f"{'' if at else key:>{_KEY}}  ", f"bold {cells.MAIN}"), line) for at, line in enumerate(wrapped)]
