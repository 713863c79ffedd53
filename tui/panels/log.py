"""The log: what happened, in lines that a person reads; searchable when zoomed."""

from __future__ import annotations

from textual.content import Content

from qlora_tui.tui import words
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.base import Panel, View
from qlora_tui.tui.state import Line, RunState


class LogPanel(Panel):
    """The last lines, or those that hold the searched words."""

    digit = "5"
    noun = "log"

    def heading(self, state: RunState, view: View) -> Content:
        """Return the name, and what is searched for."""
        parts = [(self.digit, "bold $primary"), (" log", "")]
        if view.needle:
            parts += [(f"  lines with {view.needle!r}: {len(matching(state, view.needle))}  ", cells.WARN), ("esc shows all", cells.DIM)]
        elif view.scroll and view.zoomed == "log":
            parts += [(f"  {view.scroll} lines back", cells.DIM)]
        return Content.assemble(*parts)

    def draw(self, state: RunState, view: View, width: int, height: int) -> Content:
        """Draw the newest lines at the bottom, as a terminal does."""
        lines = matching(state, view.needle)
        back = min(view.scroll if view.zoomed == "log" else 0, max(0, len(lines) - height))
        end = len(lines) - back
        shown = lines[max(0, end - height) : end]
        if not shown:
            return cells.assemble([("no such line" if view.needle else "nothing yet", cells.DIM)])
        return cells.stack([_line(line, view.needle, width) for line in shown])


def matching(state: RunState, needle: str) -> list[Line]:
    """Return the log's lines that hold `needle`, whatever the case."""
    wanted = needle.casefold()
    return [line for line in state.log if wanted in line.text.casefold()]


def _line(line: Line, needle: str, width: int) -> Content:
    text = Content.styled(line.text, cells.STYLES[line.kind]) if cells.STYLES[line.kind] else Content(line.text)
    at = line.text.casefold().find(needle.casefold()) if needle else -1
    if at >= 0:
        text = text.stylize("reverse", at, at + len(needle))
    return Content.assemble((words.clock(line.t, seconds=True) + " ", cells.DIM), text).truncate(width, ellipsis=True)
