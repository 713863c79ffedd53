"""The log: what happened, in lines that a person reads; searched in place, so that what stands around a match is seen."""

from __future__ import annotations

from typing import Any

from textual.content import Content

from qlora_tui.tui import words
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.base import Panel, View, still
from qlora_tui.tui.panels.status import kept
from qlora_tui.tui.state import Line, RunState


class LogPanel(Panel):
    """The last lines, or those around a match of the search."""

    digit = "5"
    noun = "log"

    def heading(self, state: RunState, view: View) -> Content:
        """Return the name, what is searched for or how far back one is, and how old the last checkpoint is."""
        groups = [[(self.digit, "bold $primary"), (" log", "")]]
        if view.needle:
            found = len(matching(state, view.needle))
            place = f"{found - view.picked} of {found}" if found else "no"
            groups.append([(f"{place} lines with {view.needle!r}" if not found else f"{place} with {view.needle!r}", cells.WARN)])
            groups.append([("n N older, newer  esc ends", cells.DIM)])
        elif view.scroll and view.zoomed == "log":
            groups.append([(f"{view.scroll} lines back", cells.DIM)])
        if state.saved and not state.finished:
            groups.append(kept(state, view))
        return cells.assemble(cells.fit(groups, self.heading_room))

    def key(self, state: RunState, view: View) -> Any:
        """Return what is shown: the lines, and the minutes since the last checkpoint."""
        age = int((view.now - state.saved_at) // 60) if state.saved and not state.finished else None
        return state.log[-1:], len(state.log), state.saved, state.healthy, age, still(view)

    def draw(self, state: RunState, view: View, width: int, height: int) -> Content:
        """Draw the newest lines at the bottom, as a terminal does."""
        back = min(view.scroll if view.zoomed == "log" else 0, max(0, len(state.log) - height))
        end = len(state.log) - back
        start = max(0, end - height)
        if not state.log:
            return cells.assemble([("nothing yet", cells.DIM)])
        at = chosen(state, view)
        return cells.stack([_line(line, view.needle, width, chosen=start + index == at) for index, line in enumerate(state.log[start:end])])


def matching(state: RunState, needle: str) -> list[int]:
    """Return the numbers of the log's lines that hold `needle`, whatever the case, oldest first."""
    wanted = needle.casefold()
    return [index for index, line in enumerate(state.log) if wanted and wanted in line.text.casefold()]


def chosen(state: RunState, view: View) -> int | None:
    """Return the number of the line that the search stands on."""
    found = matching(state, view.needle)
    return found[-1 - min(view.picked, len(found) - 1)] if found else None


def _line(line: Line, needle: str, width: int, *, chosen: bool) -> Content:
    text = Content.styled(line.text, cells.STYLES[line.kind]) if cells.STYLES[line.kind] else Content(line.text)
    at = line.text.casefold().find(needle.casefold()) if needle else -1
    if at >= 0:
        text = text.stylize("bold reverse" if chosen else "bold underline", at, at + len(needle))
    return Content.assemble((words.clock(line.t, seconds=True) + " ", cells.DIM), text).truncate(width, ellipsis=True)
