"""Small pieces that every panel draws with: bars, sparklines, fitting text, and the ASCII stand-ins.

Foreign text enters a `Content` as plain text only, never as markup, and always through `safe_text`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from textual.content import Content
from textual.style import Style

Part = tuple[str, str]
"""Text and its style, such as ("1.284", "bold")."""

DIM = "$text-muted"
GOOD = "$success"
WARN = "$warning"
BAD = "$error"
MAIN = "$primary"
STYLES = {"info": "", "good": GOOD, "warn": WARN, "bad": BAD}

_TICKS = "▁▂▃▄▅▆▇█"
_ASCII = str.maketrans(
    {
        **dict(zip(_TICKS, "_.-~=+*#", strict=True)),
        "▏": "|",
        "▎": "|",
        "▍": "|",
        "▌": "#",
        "▋": "#",
        "▊": "#",
        "▉": "#",
        "▓": "%",
        "▒": "=",
        "░": ".",
        "●": "*",
        "○": "o",
        "◌": "o",
        "▲": "!",
        "✖": "x",
        "✔": "+",
        "■": "#",
        "◆": "E",
        "▸": ">",
        "▾": "v",
        "▴": "^",
        "▼": "v",
        "‹": "<",
        "›": ">",
        "·": "-",
        "→": ">",
        "←": "<",
        "↑": "^",
        "↓": "v",
        "─": "-",
        "│": "|",
        "°": " ",
        "±": "~",
        "…": ".",
        "×": "x",
        "—": "-",
        "–": "-",
    }
)


_THEMED = {
    "#5c6b80": "$plot-raw",
    "#56b4e9": "$plot-line",
    "#e69f00": "$plot-eval",
    "#d55e00": "$plot-bad",
    "#7d8899": "$plot-axis",
}
"""The plot's own colours, as the theme calls them: plotext knows numbers only."""


def themed(content: Content) -> Content:
    """Return `content` with the plot's colours as the theme has them, so that one plot fits dark and light."""
    spans = [span._replace(style=_in_theme(span.style)) for span in content.spans]
    return content if spans == content.spans else Content(content.plain, spans)


def _in_theme(style: Style | str) -> Style | str:
    if isinstance(style, str):
        return " ".join(_THEMED.get(word, word) for word in style.split(" "))
    colour = style.foreground
    name = _THEMED.get(colour.hex.lower()) if colour is not None else None
    return f"{'bold ' if style.bold else ''}{name}" if name else style


def plain_ascii(content: Content) -> Content:
    """Return the same cells with ASCII stand-ins, one for one; what has none becomes a question mark."""
    text = content.plain.translate(_ASCII)
    return content if text == content.plain and text.isascii() else Content(_question_marks(text), list(content.spans))


def _question_marks(text: str) -> str:
    return "".join(char if char.isascii() else "?" for char in text)


def assemble(parts: Sequence[Part]) -> Content:
    """Return parts as one content."""
    return Content.assemble(*parts)


def row(left: Sequence[Part], right: Sequence[Part], width: int) -> Content:
    """Return one line with parts at both ends; the left end is cut with an ellipsis where both do not fit."""
    end = assemble(right)
    start = assemble(left)
    room = max(0, width - end.cell_length - (1 if right else 0))
    if start.cell_length > room:
        start = start.truncate(room, ellipsis=True)
    gap = max(0, width - start.cell_length - end.cell_length)
    return Content.assemble(start, " " * gap, end)


def fit(groups: Sequence[Sequence[Part]], width: int, gap: str = "  ") -> list[Part]:
    """Return as many whole groups as fit into `width`, first ones first: nothing is shown cut in half."""
    kept: list[Part] = []
    used = 0
    for group in groups:
        need = sum(Content(text).cell_length for text, _ in group) + (len(gap) if kept else 0)
        if used + need > width:
            continue
        kept += [(gap, ""), *group] if kept else list(group)
        used += need
    return kept


def flow(groups: Sequence[Sequence[Part]], width: int, height: int, gap: str = "  ") -> list[Content]:
    """Return whole groups on as many lines as they need, at most `height`; what has no room is left out, later ones first."""
    lines: list[Content] = []
    rest = list(groups)
    while rest and len(lines) < height:
        taken = 1
        while taken < len(rest) and fits(rest[: taken + 1], width, gap):
            taken += 1
        last = len(lines) == height - 1
        lines.append(assemble(fit(rest if last else rest[:taken], width, gap)))
        rest = rest[taken:]
    return lines


def fits(groups: Sequence[Sequence[Part]], width: int, gap: str = "  ") -> bool:
    """Say whether all groups have room on one line."""
    lengths = [sum(Content(text).cell_length for text, _ in group) for group in groups]
    return sum(lengths) + len(gap) * max(0, len(lengths) - 1) <= width


def stack(lines: Sequence[Content | str]) -> Content:
    """Return lines as one content."""
    return Content("\n").join([line if isinstance(line, Content) else Content(line) for line in lines])


def bar(pieces: Sequence[tuple[float, str, str]], total: float, width: int) -> list[Part]:
    """Return a bar of `width` cells: each piece is (amount, glyph, style); the rest is free.

    A piece that is not nothing gets at least its rounded share, and the whole never exceeds the bar.
    """
    parts: list[Part] = []
    used, amount = 0, 0.0
    for value, glyph, style in pieces:
        amount += max(0.0, value)
        end = min(width, round(amount / total * width)) if total > 0 else 0
        if end > used:
            parts.append((glyph * (end - used), style))
            used = end
    if used < width:
        parts.append(("░" * (width - used), DIM))
    return parts


def spark(values: Sequence[float], width: int, *, low: float = 0.0, high: float = 100.0) -> str:
    """Return values as a line of ticks between `low` and `high`, all of them: a cell is the mean of those that share it."""
    if width <= 0 or not values or not all(map(math.isfinite, (low, high))):
        return ""
    cells = min(width, len(values))
    edges = [round(cell * len(values) / cells) for cell in range(cells + 1)]
    return "".join(_tick(values[start:end], low, high) for start, end in itertools.pairwise(edges))


def timeline(
    points: Sequence[tuple[float, float | None]], width: int, now: float, *, low: float, high: float, seconds: float = 600.0
) -> str:
    """Return what was measured in the last `seconds` as `width` ticks, the newest at the right; a time without a value stays blank.

    Args:
        points: (Unix time, value), oldest first.
        width: cells.
        now: the time at the right end.
        low: the value of the lowest tick.
        high: the value of the highest one.
        seconds: the time at the left end, before `now`.
    """
    found: list[list[float]] = [[] for _ in range(max(0, width))]
    for t, value in points:
        cell = width - 1 - int((now - t) / seconds * width)
        if value is not None and 0 <= cell < width:
            found[cell].append(value)
    return "".join(_tick(values, low, high) for values in found)


def _tick(values: Sequence[float], low: float, high: float) -> str:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return " "
    room = high - low
    mean = sum(finite) / len(finite)
    return _TICKS[max(0, min(7, int((mean - low) / room * 7.999)))] if room > 0 else _TICKS[3]
