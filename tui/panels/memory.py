"""Memory: what was predicted, what is used now, the most that was used, and what there is."""

from __future__ import annotations

import itertools

from textual.content import Content

from qlora_tui.tui import words
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.base import Panel, View
from qlora_tui.tui.panels.cells import Part
from qlora_tui.tui.state import RunState


class MemoryPanel(Panel):
    """The bar that never leaves the screen."""

    digit = "2"
    noun = "memory"

    def draw(self, state: RunState, view: View, width: int, height: int) -> Content:
        """Draw the bar with the predicted amount marked on it, and the figures beneath."""
        now, others, total = readings(state)
        if not total:
            return cells.assemble([("no reading yet", cells.DIM)])
        tail = f"  {words.gib(now or 0, unit=False)}/{words.gib(total, unit=width >= 26)}"
        length = max(8, width - len(tail))
        parts = cells.bar([(now or 0, "█", _colour(state, total)), (others, "▒", cells.DIM)], total, length)
        figures = _figures(state, others)
        figures = figures if cells.fits(figures, width) else _figures(state, others, margin=False)
        marked = _with_mark(parts, state.predicted_bytes, total, length)
        lines = [cells.assemble([*marked, (tail, "bold")]), cells.assemble(cells.fit(figures, width))]
        if height >= 3:
            lines.append(cells.assemble([("█ this run  ▒ other programs  │ predicted", cells.DIM)]))
        if height >= 6 and state.readings:
            past = [(reading.t, reading.ours) for reading in state.readings]
            line = cells.timeline(past, min(60, width - 14), state.t, low=0.0, high=float(total))
            lines.append(cells.assemble([("last 10 min   ", cells.DIM), (line, cells.MAIN)]))
        if height >= 9 and state.predicted_parts:
            lines += _parts(state, width)
        return cells.stack(lines[:height])


def readings(state: RunState) -> tuple[int | None, int, int | None]:
    """Return bytes used by this run, by others, and in all; the steps' own figure stands in for a missing sensor."""
    device, last = state.device, state.last
    now = device.memory_ours_bytes if device and device.memory_ours_bytes is not None else last.memory_reserved_bytes if last else None
    others = device.memory_others_bytes or 0 if device else 0
    total = device.memory_total_bytes if device and device.memory_total_bytes else state.machine_bytes
    return now, others, total


def _figures(state: RunState, others: int, *, margin: bool = True) -> list[list[Part]]:
    found: list[list[Part]] = []
    if state.predicted_bytes is not None:
        around = f" ± {words.gib(state.predicted_margin, unit=False)}" if state.predicted_margin and margin else ""
        found.append([("predicted ", cells.DIM), (f"{words.gib(state.predicted_bytes, unit=False)}{around}", "")])
    if state.peak_bytes:
        over = state.predicted_bytes is not None and state.peak_bytes > state.predicted_bytes * 1.1
        found.append([("peak ", cells.DIM), (words.gib(state.peak_bytes, unit=False), cells.WARN if over else "")])
    if others:
        found.append([("others ", cells.DIM), (words.gib(others, unit=False), "")])
    now, _, total = readings(state)
    if total:
        found.append([("free ", cells.DIM), (words.gib(max(0, total - (now or 0) - others), unit=False), "")])
    return found


def _parts(state: RunState, width: int) -> list[Content]:
    """Return what was predicted, part by part, as bars: seen when the panel fills the screen."""
    lines = [Content(" "), cells.assemble([("predicted at the fullest moment, an estimate", "bold")])]
    most = max([amount for _, amount in state.predicted_parts] + [1])
    length = max(6, min(40, width - 30))
    for name, amount in sorted(state.predicted_parts, key=lambda part: -part[1]):
        bar = cells.bar([(amount, "█", cells.MAIN)], most, length)
        lines.append(cells.assemble([(f"{name:<14}", ""), (f"{words.size(amount):>9}  ", "bold"), *bar[: 1 if amount else 0]]))
    return lines


def _colour(state: RunState, total: int) -> str:
    now, others, _ = readings(state)
    share = ((now or 0) + others) / total
    return cells.BAD if share > 0.97 else cells.WARN if share > 0.92 else cells.GOOD


def _with_mark(parts: list[Part], predicted: int | None, total: int, length: int) -> list[Part]:
    """Return the bar with a thin line at the predicted amount, where that lies beyond what this run uses."""
    if predicted is None:
        return parts
    drawn = [(glyph, style) for text, style in parts for glyph in text]
    at = min(length - 1, round(predicted / total * length))
    if not 0 <= at < len(drawn) or drawn[at][0] == "█":
        return parts
    drawn[at] = ("│", "bold")
    return [("".join(glyph for glyph, _ in run), style) for style, run in _runs(drawn)]


def _runs(drawn: list[Part]) -> list[tuple[str, list[Part]]]:
    return [(style, list(run)) for style, run in itertools.groupby(drawn, key=lambda part: part[1])]
