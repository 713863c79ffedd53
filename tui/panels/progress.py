"""What is done before the first step: the silent minutes in which people think that a run hangs."""

from __future__ import annotations

from textual.content import Content

from qlora_tui.tui import words
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.base import View
from qlora_tui.tui.panels.cells import Part
from qlora_tui.tui.state import Doing, RunState, phase_words

_LABEL = 31


def progress(state: RunState, view: View, width: int, height: int) -> Content:
    """Draw ended phases with their seconds, and the one at work with a bar where it can be counted."""
    lines: list[Content] = []
    for name, seconds in state.phases:
        lines.append(cells.assemble([("  ✔ ", cells.GOOD), (f"{name:<{_LABEL}} ", ""), (words.duration(seconds), cells.DIM)]))
    if state.finished or view.lost:
        lines.append(cells.assemble([("  nothing was trained", cells.DIM)]))
    elif state.doing:
        lines += working(state.doing, view, width)
    else:
        lines.append(cells.assemble([("  ◌ ", cells.MAIN), ("starting", "")]))
    return cells.stack(lines[-height:] if height > 0 else lines)


def working(doing: Doing, view: View, width: int) -> list[Content]:
    """Return the line of the phase at work, with its bar and note."""
    parts: list[Part] = [("  ◌ ", f"bold {cells.MAIN}"), (f"{phase_words(doing.name, doing.note):<{_LABEL}} ", "bold")]
    passed = words.duration(view.now - doing.since)
    if doing.total and doing.done is not None:
        share = min(1.0, max(0.0, doing.done / doing.total))
        length = max(6, min(30, width - _LABEL - 29))
        parts += cells.bar([(share, "█", cells.MAIN)], 1.0, length)
        parts += [(f" {share:4.0%} ", "bold"), (amount(doing), cells.DIM)]
    else:
        parts += [(passed, cells.DIM)]
    lines = [cells.assemble(parts)]
    if doing.note and doing.note not in phase_words(doing.name, doing.note):
        lines.append(cells.assemble([("    " + doing.note, cells.DIM)]).truncate(width, ellipsis=True))
    return lines


def amount(doing: Doing) -> str:
    """Return how much of a phase is done, in its own unit."""
    if doing.done is None or doing.total is None:
        return ""
    if doing.unit == "bytes":
        return f"{words.size(doing.done)} of {words.size(doing.total)}"
    return f"{doing.done:,} of {doing.total:,} {doing.unit}".rstrip()
