"""The loss: raw range, smoothed line, measured points; before the first step, what is being done instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from textual.content import Content

from qlora_tui.tui import axes, plot, words
from qlora_tui.tui.axes import nice_ticks
from qlora_tui.tui.history import Bucket, at_step
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.base import Panel, View, still
from qlora_tui.tui.panels.cells import Part
from qlora_tui.tui.panels.progress import progress
from qlora_tui.tui.state import RunState

PLOT_SECONDS = 1.0
_MARKS = {"saved": "saved", "warning": "warning", "rate": "rate set", "pause": "pause", "resume": "resumed", "back": "went back"}
_AXIS = {"step": "", "tokens": "by tokens", "time": "by time"}


class LossPanel(Panel):
    """The biggest panel of the screen."""

    digit = "1"
    noun = "loss"
    _cut_off = False

    def show(self, state: RunState, view: View) -> None:
        """Draw; a curve that only grows is drawn once a second, since a fast run would redraw it at every look."""
        same = _chosen(view) == _chosen(self._view) and state.last is not None and state.finished is None
        if same and self._shown is not None and 0 <= view.now - self._view.now < PLOT_SECONDS:
            return
        super().show(state, view)

    def heading(self, state: RunState, view: View) -> Content:
        """Return the legend, which names every mark that is drawn and only those; the figures at the crosshair while there is one."""
        if not state.last:
            return Content.assemble((self.digit, "bold $primary"), " getting ready")
        groups: list[list[Part]] = [[(self.digit, "bold $primary"), (" loss", "bold")]]
        if view.sight.cross is not None:
            groups += _at_cross(state, view)
        else:
            groups += [*_legend(state, view, cut_off=self._cut_off), *_mode(state, view), *_marks_named(state, view)]
        return cells.assemble(cells.fit(groups, self.heading_room))

    def key(self, state: RunState, view: View) -> Any:
        """Return what is plotted, since the plot is slow to draw; before the first step, the phases and the clock."""
        if not state.last:
            return state.seq, still(view), None if state.finished or view.lost else int(view.now)
        return state.history, state.evals, state.moments, state.findings, horizon(state), state.finished is None, still(view)

    def draw(self, state: RunState, view: View, width: int, height: int) -> Content:
        """Draw the plot, or the phases before there is anything to plot."""
        if not state.last:
            return progress(state, view, width, height)
        whole = state.history.buckets
        series = plot.Series(buckets_of(state, view), state.evals, marks(state), horizon(state), whole)
        drawn = plot.draw(series, width, height, plot.Look(view.log_y, view.ascii_only, view.sight))
        self._cut_off = any(glyph in drawn.plain for glyph in "▲▼^")
        return Content.from_rich_text(drawn)


def buckets_of(state: RunState, view: View) -> tuple[Bucket, ...]:
    """Return what is drawn: the steps read again for a closer look, else the history."""
    return view.close if view.sight.span and view.close else state.history.buckets


def marks(state: RunState) -> dict[str, list[int]]:
    """Return the steps at which something happened, by kind."""
    found: dict[str, list[int]] = {"warning": [finding.step for finding in state.warnings]}
    for moment in state.moments:
        found.setdefault(moment.kind, []).append(moment.step)
    return found


def horizon(state: RunState) -> int:
    """Return where the x axis ends: at the last step once a third is done, else a little ahead of now."""
    if state.finished:
        return state.step
    if state.step * 3 >= state.total_steps:
        return state.total_steps
    step = nice_ticks(0, state.step * 1.5, 3)
    return int(min(state.total_steps, step[-1] + (step[-1] - step[-2] if len(step) > 1 else 1)))


def edges(state: RunState, view: View) -> tuple[int, int, int]:
    """Return the first and the last step of the run, and where the axis ends."""
    buckets = state.history.buckets
    first = min([bucket.first for bucket in buckets[:1]] + [step for step, _ in state.evals[:1]] or [0])
    return first, state.step, horizon(state)


def _chosen(view: View) -> View:
    return replace(view, now=0.0, close=None, share=1.0)


def _legend(state: RunState, view: View, *, cut_off: bool) -> list[list[Part]]:
    raw, smooth, point = (":", "*", "E") if view.ascii_only else ("░", "─", "◆")
    groups = [
        [("raw ", cells.DIM), (raw, _hex(plot.RAW))],
        [(f"smooth {view.sight.smoothing:g} ", cells.DIM), (smooth, f"bold {_hex(plot.SMOOTH)}")],
    ]
    if state.evals:
        groups.append([("held-out ", cells.DIM), (point, f"bold {_hex(plot.EVAL)}")])
    if state.history.bad:
        glyph = "x" if view.ascii_only else "×"
        groups.append([(f"{state.history.bad:,} not finite ", cells.DIM), (glyph, f"bold {_hex(plot.BAD)}")])
    if cut_off:
        groups.append([("cut off ", cells.DIM), ("^" if view.ascii_only else "▲", f"bold {_hex(plot.EVAL)}")])
    return groups


def _marks_named(state: RunState, view: View) -> list[list[Part]]:
    found: list[list[Part]] = []
    there = marks(state)
    for kind, name in _MARKS.items():
        if there.get(kind):
            glyph, plain, style = plot.GLYPHS[kind]
            found.append([(f"{name} ", cells.DIM), (plain if view.ascii_only else glyph, style)])
    return found


def _mode(state: RunState, view: View) -> list[list[Part]]:
    """Return what differs from the usual look: axis, zoom and how fine it is, and how much of the file was read."""
    told = ["log" if view.log_y else "", _AXIS[view.sight.counts], "all values" if view.sight.everything else ""]
    told.append(_fineness(state, view))
    if view.share < 1.0:
        told.insert(0, f"reading {view.share:.0%}")
    return [[(text, cells.DIM)] for text in told if text]


def _fineness(state: RunState, view: View) -> str:
    """Return how many steps are in sight and how many make a point."""
    if not view.sight.span:
        return ""
    widest = max((bucket.last - bucket.first + 1 for bucket in buckets_of(state, view)[-3:-1]), default=1)
    return f"{view.sight.span:,} steps, {'each' if widest == 1 else f'by {widest}'}"


def _at_cross(state: RunState, view: View) -> list[list[Part]]:
    """Return the figures of the steps under the crosshair."""
    buckets: Sequence[Bucket] = buckets_of(state, view)
    at = at_step(tuple(buckets), view.sight.cross or 0)
    if at < 0:
        return [[("no step here", cells.DIM)]]
    bucket, finite = buckets[at], buckets[at].high >= buckets[at].low
    one = bucket.first == bucket.last
    step = f"step {bucket.last:,}" if one else f"steps {bucket.first:,}-{bucket.last:,}"
    raw = words.number(bucket.high) if bucket.low == bucket.high else f"{words.number(bucket.low)}-{words.number(bucket.high)}"
    found: list[list[Part]] = [[(step, "bold")], [("raw ", cells.DIM), (raw if finite else "not finite", "")]]
    found.append([(f"smooth {view.sight.smoothing:g} ", cells.DIM), (words.number(bucket.smooth[view.sight.weight]), "")])
    measured = [(step, loss) for step, loss in state.evals if step <= bucket.last]
    found.append([("lr ", cells.DIM), (words.rate(bucket.rate), "")])
    found.append([("grad ", cells.DIM), (words.number(bucket.grad, 2), "")])
    if measured:
        there, loss = measured[-1]
        where = "" if there == bucket.last else f" at {there:,}"
        found.append([("held-out ", cells.DIM), (words.number(loss), ""), (where, cells.DIM)])
    if view.sight.counts == "tokens":
        found.append([(f"{axes.amount(bucket.tokens)} tokens", cells.DIM)])
    if view.sight.counts == "time":
        found.append([(words.duration(bucket.seconds), cells.DIM)])
    return found


def _hex(colour: tuple[int, int, int]) -> str:
    return f"#{colour[0]:02x}{colour[1]:02x}{colour[2]:02x}"
