"""The whole run in a few words, for a terminal too small for panels."""

from __future__ import annotations

from typing import Any

from textual.content import Content

from qlora_tui.tui import words
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.base import Panel, View, still
from qlora_tui.tui.panels.memory import readings
from qlora_tui.tui.panels.status import figures, state_words
from qlora_tui.tui.state import RunState


class SummaryPanel(Panel):
    """One figure a line, most important first."""

    noun = "summary"

    def heading(self, state: RunState, view: View) -> Content:
        """Return nothing: there is no frame."""
        return Content("")

    def key(self, state: RunState, view: View) -> Any:
        """Return what is shown: the clock counts in whole seconds, and only while the run goes on."""
        return state.seq, still(view), None if state.finished or view.lost else int(view.now)

    def draw(self, state: RunState, view: View, width: int, height: int) -> Content:
        """Draw as many lines as fit."""
        now, _, total = readings(state)
        lines = [cells.assemble([state_words(state, view)]), *[cells.assemble(group) for group in figures(state, view)]]
        if now and total:
            lines.append(cells.assemble([("memory ", cells.DIM), (f"{words.gib(now, unit=False)}/{words.gib(total)}", "")]))
        if state.warnings:
            lines.append(cells.assemble([(f"▲ {len(state.warnings)} warning{'s' if len(state.warnings) > 1 else ''}", cells.WARN)]))
        return cells.stack([line.truncate(width, ellipsis=True) for line in lines[:height]])
