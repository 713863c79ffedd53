"""Warnings, newest first, each with what to do about it."""

from __future__ import annotations

from typing import Any

from textual.content import Content

from qlora_tui.engine.events import Finding
from qlora_tui.engine.text import one_line
from qlora_tui.tui import words
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.base import Panel, View
from qlora_tui.tui.state import RunState

_GLYPHS = {"info": ("·", cells.DIM), "warn": ("▲", cells.WARN), "stop": ("✖", cells.BAD)}


class FindingsPanel(Panel):
    """What the watch said; one line each, all of the advice when zoomed."""

    digit = "4"
    noun = "warnings"

    def heading(self, state: RunState, view: View) -> Content:
        """Return the number of warnings, so that an empty panel says that all is well."""
        count = len(state.warnings)
        return Content.assemble((self.digit, "bold $primary"), " warnings ", (f"({count})", cells.WARN if count else cells.DIM))

    def draw(self, state: RunState, view: View, width: int, height: int) -> Content:
        """Draw the newest warnings that fit."""
        if not state.findings:
            return cells.assemble([("✔ ", cells.GOOD), ("nothing to worry about so far", cells.DIM)])
        ordered = sorted(state.findings, key=lambda finding: (finding.severity != "info", finding.step), reverse=True)
        lines: list[Content] = []
        for finding in ordered:
            lines += _lines(finding, width, full=view.zoomed == "findings")
            if len(lines) >= height + view.scroll:
                break
        return cells.stack(lines[view.scroll if view.zoomed == "findings" else 0 :][:height])


def _lines(finding: Finding, width: int, *, full: bool) -> list[Content]:
    glyph, style = _GLYPHS.get(finding.severity, _GLYPHS["warn"])
    advice = [one_line(text, limit=300) for text in finding.advice]
    head = [(f"{glyph} ", style), (f"{finding.step} ", cells.DIM), (one_line(finding.message, limit=300), "")]
    if full:
        told = [_evidence(finding, width)] if finding.numbers else []
        return [cells.assemble(head).truncate(width, ellipsis=True), *told, *[_advice(text, width) for text in advice]]
    if advice:
        head += [(": ", cells.DIM), (advice[0], "italic")]
    return [cells.assemble(head).truncate(width, ellipsis=True)]


def _evidence(finding: Finding, width: int) -> Content:
    """Return the rule that spoke and the numbers it rests on."""
    numbers = [f"{name.replace('_', ' ')} {_figure(value)}" for name, value in finding.numbers.items()]
    text = one_line(f"{finding.detector}: {', '.join(numbers)}", limit=300)
    return cells.assemble([("    ", ""), (text, cells.DIM)]).truncate(width, ellipsis=True)


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return words.number(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _advice(text: str, width: int) -> Content:
    return cells.assemble([("    → ", cells.DIM), (text, "italic")]).truncate(width, ellipsis=True)
