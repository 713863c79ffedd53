"""The loss: raw range, smoothed line, measured points; before the first step, what is being done instead."""

from __future__ import annotations

from typing import Any

from textual.content import Content

from qlora_tui.tui import plot
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.base import Panel, View, still
from qlora_tui.tui.panels.progress import progress
from qlora_tui.tui.state import RunState

PLOT_SECONDS = 1.0


class LossPanel(Panel):
    """The biggest panel of the screen."""

    digit = "1"
    noun = "loss"

    def show(self, state: RunState, view: View) -> None:
        """Draw; a curve that only grows is drawn once a second, since a fast run would redraw it at every look."""
        same = still(view) == still(self._view) and state.last is not None and state.finished is None
        if same and self._shown is not None and 0 <= view.now - self._view.now < PLOT_SECONDS:
            return
        super().show(state, view)

    def heading(self, state: RunState, view: View) -> Content:
        """Return the legend; it names every mark that is drawn, and only those."""
        if not state.last:
            return Content.assemble((self.digit, "bold $primary"), " getting ready")
        raw, smooth, point, saved = (":", "*", "E", "^") if view.ascii_only else ("░", "─", "◆", "▴")
        parts = [(self.digit, "bold $primary"), (" loss  ", "bold")]
        parts += [("raw ", cells.DIM), (raw, _hex(plot.RAW)), ("  smooth ", cells.DIM), (smooth, f"bold {_hex(plot.SMOOTH)}")]
        if state.evals:
            parts += [("  held-out ", cells.DIM), (point, f"bold {_hex(plot.EVAL)}")]
        if state.marks:
            parts += [("  saved ", cells.DIM), (saved, plot.AXIS)]
        if state.history.bad:
            parts += [(f"  {state.history.bad} not finite ", cells.DIM), ("x" if view.ascii_only else "×", f"bold {_hex(plot.BAD)}")]
        if view.log_y:
            parts += [("  log", cells.DIM)]
        return Content.assemble(*parts)

    def key(self, state: RunState, view: View) -> Any:
        """Return what is plotted, since the plot is slow to draw; before the first step, the phases and the clock."""
        if not state.last:
            return state.seq, still(view), None if state.finished or view.lost else int(view.now)
        marks = tuple(mark.step for mark in state.marks)
        return state.history, state.evals, marks, horizon(state), state.finished is None, still(view)

    def draw(self, state: RunState, view: View, width: int, height: int) -> Content:
        """Draw the plot, or the phases before there is anything to plot."""
        if not state.last:
            return progress(state, view, width, height)
        checkpoints = [mark.step for mark in state.marks]
        series = plot.Series(state.history.buckets, state.evals, checkpoints, horizon(state))
        return Content.from_rich_text(plot.draw(series, width, height, plot.Look(view.log_y, view.ascii_only)))


def horizon(state: RunState) -> int:
    """Return where the x axis ends: at the last step once a third is done, else a little ahead of now."""
    if state.finished:
        return state.step
    if state.step * 3 >= state.total_steps:
        return state.total_steps
    step = plot.nice_ticks(0, state.step * 1.5, 3)
    return int(min(state.total_steps, step[-1] + (step[-1] - step[-2] if len(step) > 1 else 1)))


def _hex(colour: tuple[int, int, int]) -> str:
    return f"#{colour[0]:02x}{colour[1]:02x}{colour[2]:02x}"
