"""The palette: everything that can be done on a screen now, found by its words."""

from __future__ import annotations

from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.dom import DOMNode
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from qlora_tui.tui.actions import Action, written
from qlora_tui.tui.panels import cells
from qlora_tui.tui.screens.keys import KeyedScreen, bindings, chosen_keys, offered
from qlora_tui.tui.screens.line import Line

_WIDTH = 76


class PaletteDialog(ModalScreen[None]):
    """A line to type in and what fits it; the words may come in any order."""

    BINDINGS: ClassVar[list[BindingType]] = bindings("palette")

    def __init__(self, screen: KeyedScreen) -> None:
        """Offer what `screen` would do now."""
        super().__init__()
        self._found = [(action, node) for action, node in offered(screen) if action.palette and action.label]
        self._fitting = self._found
        self._chosen = chosen_keys(screen)
        self._ascii = screen.app.has_class("-ascii")

    def compose(self) -> ComposeResult:
        """Lay out the line and the list."""
        with Vertical(id="dialog"):
            yield Line(placeholder="what do you want to do?", id="words", compact=True)
            found = OptionList(id="found", compact=True)
            found.can_focus = False
            yield found
            yield Static("up/down choose   enter do it   esc back", markup=False, classes="keys")

    def on_mount(self) -> None:
        """List everything."""
        self._list("")
        self.query_one("#words", Input).focus()

    def action_move(self, lines: int) -> None:
        """Choose another line while one types."""
        listed = self.query_one("#found", OptionList)
        if listed.option_count:
            listed.highlighted = max(0, min(listed.option_count - 1, (listed.highlighted or 0) + lines))

    async def action_take(self) -> None:
        """Close, and do what is chosen."""
        chosen = self.query_one("#found", OptionList).highlighted
        if chosen is not None and chosen < len(self._fitting):
            await self._do(*self._fitting[chosen])

    @on(Input.Changed, "#words")
    def _typed(self, event: Input.Changed) -> None:
        event.stop()
        self._list(event.value)

    @on(OptionList.OptionSelected, "#found")
    async def _clicked(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        await self._do(*self._fitting[event.option_index])

    async def _do(self, action: Action, node: DOMNode) -> None:
        app = self.app
        self.dismiss()
        app.call_later(app.run_action, action.call, node)  # once this window is gone: the action may open another

    def _list(self, typed: str) -> None:
        words = typed.lower().split()
        self._fitting = [(action, node) for action, node in self._found if all(word in _text(action) for word in words)]
        listed = self.query_one("#found", OptionList)
        listed.clear_options()
        listed.add_options([Option(self._line(action)) for action, _ in self._fitting])
        listed.highlighted = 0 if self._fitting else None

    def _line(self, action: Action) -> Content:
        width = max(20, min(_WIDTH, self.app.size.width) - 8)
        key = written(action, self._chosen) if action.keys else ""
        line = cells.row([(f"{action.label:<14}  ", "bold"), (action.words, "")], [(key, f"bold {cells.MAIN}")], width)
        return cells.plain_ascii(line) if self._ascii else line


def _text(action: Action) -> str:
    return f"{action.label} {action.words} {action.name}".lower()
