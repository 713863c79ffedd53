"""A form field of one line: label, value between arrows, and a half-sentence; a fault appears beneath it."""

from __future__ import annotations

import textwrap
from typing import ClassVar

from textual import events
from textual.binding import BindingType
from textual.content import Content
from textual.message import Message
from textual.widgets import Static

from qlora_tui.engine.errors import ConfigError
from qlora_tui.engine.spec import KEYS, RunConfig
from qlora_tui.engine.text import one_line
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.cells import Part
from qlora_tui.tui.screens.keys import bindings, means_something
from qlora_tui.tui.screens.settings import Setting

LABEL = 15
VALUE, SHORT_VALUE, NARROW = 17, 10, 70
"""Cells for the value, and for it on a screen narrower than the last: what stands beside it needs them more."""


class FieldRow(Static, can_focus=True):
    """One setting on a line of its own."""

    BINDINGS: ClassVar[list[BindingType]] = bindings("field")

    class Changed(Message):
        """The person changed the setting: the run as it would be now. What is typed at a stretch is one `group`."""

        def __init__(self, run: RunConfig, group: str = "") -> None:
            """Carry the new run."""
            super().__init__()
            self.run, self.group = run, group

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
        self.beside: Part = (setting.note, cells.DIM)
        self._ascii = ascii_only
        self._typing: str | None = None
        self._stretches = 0
        self._drawn: Content | None = None
        self._current = False
        self.fault = ""

    def on_mount(self) -> None:
        """Draw for the first time."""
        self.redraw()

    def use(self, run: RunConfig, beside: Part, *, anew: bool = False) -> None:
        """Show another run with what stands beside its value; `anew`: what is being typed is dropped, such as after an undo."""
        self.run, self.beside = run, beside
        if anew:
            self._typing, self.fault = None, ""
        self.redraw()

    def check_consume_key(self, key: str, character: str | None) -> bool:
        """Say that letters are typed here and are no keys, so that the foot of the screen does not offer them."""
        return self.setting.letters and character is not None and character.isprintable() and character not in "? "

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
        elif event.character and event.is_printable and self._takes(event.key, event.character):
            self._type((self._typing or "") + event.character)
        else:
            return
        event.stop()
        event.prevent_default()

    def _takes(self, key: str, character: str) -> bool:
        """Say whether `character` is typed: the keys of the page are not, but where a value may hold letters."""
        if self.setting.letters:
            return character not in "? "
        unit = character == "m" and bool(self._typing) and KEYS[self.setting.name].kind == "duration"
        return unit or (character != " " and not means_something(self.screen, key))

    def on_paste(self, event: events.Paste) -> None:
        """Take pasted text as if it were typed."""
        if self.setting.typed:
            self._type((self._typing or "") + one_line(event.text, limit=40))
            event.stop()

    def on_resize(self) -> None:
        """Draw for the new width."""
        self.redraw()

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
        most = SHORT_VALUE if self.app.size.width < NARROW else VALUE
        if len(shown) > most:  # what is being typed is seen at its end
            shown = f"…{shown[1 - most :]}" if cursor else f"{shown[: most - 1]}…"
        room = max(0, most - Content(shown).cell_length)
        width = max(20, self.size.width or 76)
        line = Content.assemble(
            (f" {self.setting.label:<{LABEL}}", "bold" if focused else ""),
            (f"{left} ", cells.MAIN),
            (shown, f"bold {cells.BAD if self.fault else cells.MAIN if focused else ''}".strip()),
            (f" {right}", cells.MAIN),
            (" " * room, ""),
            self.beside,
        )
        indent = " " * (LABEL + 3)
        told = textwrap.wrap(f"✖ {self.fault}", max(20, width - len(indent))) if self.fault else []
        lines = [line, *[Content.styled(f"{indent}{part}", cells.BAD) for part in told]]
        drawn = cells.plain_ascii(cells.stack(lines)) if self._ascii else cells.stack(lines)
        if self._drawn is None or not self._drawn.is_same(drawn):
            grown = self._drawn is None or self._drawn.plain.count("\n") != drawn.plain.count("\n")
            self._drawn = drawn
            self.update(drawn, layout=grown)

    def _type(self, text: str) -> None:
        self._stretches += self._typing is None
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
        self._take(run, f"{self.setting.name} {self._stretches}")

    def _take(self, run: RunConfig, group: str = "") -> None:
        self.run = run
        self.post_message(self.Changed(run, group))
        self.redraw()
