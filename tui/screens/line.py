"""A line to type in that holds nothing but what can be shown: Textual would send pasted escapes to the terminal."""

from __future__ import annotations

from textual.widgets import Input

from qlora_tui.engine.text import safe_text


class Line(Input):
    """An `Input` without control, bidi and format characters, whatever is pasted or set."""

    def validate_value(self, value: str) -> str:
        """Drop every character that would have to be escaped; called before each change of `value`."""
        return "".join(char for char in value if char.isprintable() and safe_text(char) == char)
