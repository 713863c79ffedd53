"""A form field of one line: label, value between arrows, and a half-sentence; a fault appears beneath it."""

from __future__ import annotations

from typing import ClassVar

from textual import events
from textual.binding import BindingType
from textual.content import Content
from textual.message import Message
from textual.widgets import Static

from qlora_tui.engine.errors import ConfigError
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.text import one_line
from qlora_tui.tui.panels import cells
from qlora_tui.tui.screens.keys import bindings, means_something
from qlora_tui.tui.screens.settings import Setting

LABEL = 15
VALUE = 17


class FieldRow(Static, can_focus=True):
    """One setting on a line of its own."""

    BINDINGS: ClassVar[list[BindingType]] = bindings("field")

    class Changed(Message):
        """The person changed the setting: the run as it would be now."""

        def __init__(self, run: RunConfig) -> None:
            """Carry the new run."""
            super().__init__()
            self.run = run

    class Entered(Message):
        """The field has the focus now; its help should be seen."""

        def __init__(self, setting: Setting) -> None:
            """Carry the setting."""
            super().__init__()
            self.setting = setting

    def __init__(self, setting: Setting, run: RunConfig, *, ascii_only: bool = False) -> None:
        """Show `setting` of `run`."""
        super().__init__("", markup=False, id=f"field-{setting.name}")
        self.setting, self.run = setting, run
        self.note = setting.note
        self._ascii = ascii_only
        self._typing: str | None = None
        self._drawn: Content | None = None
        self._current = False
        self.fault = ""

    def on_mount(self) -> None:
        """Draw for the first time."""
        self.redraw()

    def use(self, run: RunConfig, note: str | None = None) -> None:
        """Show another run, unless the person is typing in this very field."""
        self.run = run
        if note is not None:
            self.note = note
        self.redraw()

    def action_step(self, direction: int) -> None:
        """Take the next value of the ladder or of the choices."""
        self._typing, self.fault = None, ""
        self._take(self.setting.stepped(self.run, direction))

    def on_key(self, event: events.Key) -> None:
        """Take typing: digits and letters replace the value, backspace deletes."""
        if not self.setting.typed:
            return
        if event.key == "backspace":
            self._type((self._typing if self._typing is not None else self.setting.shown(self.run))[:-1])
        elif self._begins_a_value(event):
            self._type((self._typing or "") + (event.character or ""))
        else:
            return
        event.stop()
        event.prevent_default()

    def _begins_a_value(self, event: events.Key) -> bool:
        """Say whether a key is text: a letter that means something here is text only once one has begun to type."""
        if not event.character or not event.is_printable or event.character == " ":
            return False
        return bool(self._typing) or not means_something(self.screen, event.key)

    def on_paste(self, event: events.Paste) -> None:
        """Take pasted text as if it were typed."""
        if self.setting.typed:
            self._type((self._typing or "") + one_line(event.text, limit=40))
            event.stop()

    def on_focus(self) -> None:
        """Say that this field is the current one; Textual's own flag changes only after this."""
        self._current = True
        self.post_message(self.Entered(self.setting))
        self.redraw()

    def on_blur(self) -> None:
        """Forget half-typed text that is not a value; the fault stays to be seen."""
        self._current = False
        if not self.fault:
            self._typing = None
        self.redraw()

    def on_click(self) -> None:
        """Take the focus."""
        self.focus()

    def redraw(self) -> None:
        """Draw the line, and the fault beneath if there is one."""
        focused = self._current
        value = self._typing if self._typing is not None else self.setting.shown(self.run)
        cursor = "_" if self._typing is not None and focused else ""
        left, right = ("‹", "›") if focused else (" ", " ")
        shown = one_line(value, limit=200) + cursor
        if len(shown) > VALUE:  # what is being typed is seen at its end
            shown = f"…{shown[1 - VALUE :]}" if cursor else f"{shown[: VALUE - 1]}…"
        room = max(0, VALUE - Content(shown).cell_length)
        line = Content.assemble(
            (f" {self.setting.label:<{LABEL}}", "bold" if focused else ""),
            (f"{left} ", cells.MAIN),
            (shown, f"bold {cells.BAD if self.fault else cells.MAIN if focused else ''}".strip()),
            (f" {right}", cells.MAIN),
            (" " * room + self.note, cells.DIM),
        )
        lines = (
            [line]
            if not self.fault
            else [
                line,
                Content.assemble((" " * (LABEL + 3), ""), (f"✖ {self.fault}", cells.BAD)).truncate(
                    max(20, self.size.width or 76), ellipsis=True
                ),
            ]
        )
        drawn = cells.plain_ascii(cells.stack(lines)) if self._ascii else cells.stack(lines)
        if self._drawn is None or not self._drawn.is_same(drawn):
            grown = self._drawn is None or self._drawn.plain.count("\n") != drawn.plain.count("\n")
            self._drawn = drawn
            self.update(drawn, layout=grown)

    def _type(self, text: str) -> None:
        self._typing = text
        try:
            run = self.setting.read(self.run, text)
        except ConfigError as error:
            said = one_line(error.problem.message).removeprefix(f"{self.setting.name} = ")  # its label stands beside it
            self.fault = said + (f"; {one_line(error.problem.hint)}" if error.problem.hint else "")
            self.post_message(self.Changed(self.run))
            self.redraw()
            return
        self.fault = ""
        self._take(run)

    def _take(self, run: RunConfig) -> None:
        self.run = run
        self.post_message(self.Changed(run))
        self.redraw()
