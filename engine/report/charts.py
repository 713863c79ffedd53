"""Drawings of a report: small SVG, made here, since what is needed is two kinds of chart and no script.

Colours and widths come from the page's style sheet, so that one drawing serves light, dark and paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from markupsafe import Markup, escape

from qlora_tui.engine.report.blocks import Bars, Curves, Line, Point

_WIDE, _HALF, _HIGH = 720, 350, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 12, 26
_MOST_POINTS = 700
_TICKS = 5
_LARGEST, _APART = 1e9, 1e-12


def curves(block: Curves) -> Markup:
    """Return curves over steps; points that are no numbers are left out, and an outlier does not flatten the rest."""
    lines = [(line, _thinned([point for point in line.points if all(map(_drawable, point))])) for line in block.lines]
    points = [point for _, found in lines for point in found]
    width, height = (_WIDE, _HIGH) if block.wide else (_HALF, _HIGH * 2 // 3)
    if not points:
        return Markup("")
    low, high = _span([y for _, y in points])
    scale = _Scale(min(x for x, _ in points), max(x for x, _ in points), low, high, width, height)
    parts = [*_axes(scale), *(part for line, found in lines if found for part in _drawn(line, found, scale))]
    legend = Markup("").join(
        Markup('<span class="key {}">{}</span>').format(line.look, line.name) for line, found in lines if found and line.name
    )
    title = Markup("{}{}").format(block.title, f", {block.unit}" if block.unit else "")
    return Markup('<figure class="{}"><figcaption><b>{}</b>{}</figcaption>{}</figure>').format(
        "chart" if block.wide else "chart half", title, legend, _svg(parts, width, height, block.title)
    )


def bars(block: Bars) -> Markup:
    """Return signed bars from a line of zero."""
    values = [value for value in block.values if _drawable(value)]
    if not values:
        return Markup("")
    height = _HIGH * 3 // 4
    scale = _Scale(0, len(values), min(0.0, *values), max(0.0, *values), _WIDE, height)
    each = (scale.x(1) - scale.x(0)) * 0.8
    parts = list(_axes(scale, along=False))
    zero = scale.y(0.0)
    for index, value in enumerate(values):
        y, look = scale.y(value), "gain" if value >= 0 else "loss"
        x, top, tall = scale.x(index) + each * 0.125, min(y, zero), max(1.0, abs(y - zero))
        parts.append(Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(look, x, top, each, tall))
    parts.append(Markup('<line class="axis" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(_LEFT, _WIDE - _RIGHT, zero, zero))
    caption = Markup("<figcaption><b>{}{}</b></figcaption>").format(block.title, f", {block.unit}" if block.unit else "")
    return Markup('<figure class="chart">{}{}</figure>').format(caption, _svg(parts, _WIDE, height, block.title))


class _Scale:
    """From figures to places in a drawing."""

    def __init__(self, x0: float, x1: float, y0: float, y1: float, width: int, height: int) -> None:
        self.x0, self.x1 = x0, x1 if x1 > x0 + _APART else x0 + 1
        self.y0, self.y1 = y0, y1 if y1 > y0 + _APART else y0 + 1
        self.width, self.height = width, height

    def x(self, value: float) -> float:
        """Return the place across of `value`."""
        return _LEFT + (value - self.x0) / (self.x1 - self.x0) * (self.width - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """Return the place from the top of `value`, within the drawing."""
        share = min(1.0, max(0.0, (value - self.y0) / (self.y1 - self.y0)))
        return self.height - _BOTTOM - share * (self.height - _TOP - _BOTTOM)


def _drawable(value: float) -> bool:
    return math.isfinite(value) and abs(value) < _LARGEST


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Return the lowest and highest of what should be seen: a few outliers far above the rest run into the upper edge."""
    ordered = sorted(values)
    usual = ordered[int(0.98 * (len(ordered) - 1))]
    low, high = ordered[0], ordered[-1]
    if high - low > 4 * (usual - low) > 0:
        high = low + 1.5 * (usual - low)
    if high - low <= _APART * max(1.0, abs(low)):  # a level: seen in the middle
        return (0.0, 2 * low) if low > 0 else (2 * low, 0.0) if low < 0 else (0.0, 1.0)
    room = 0.05 * (high - low)
    return (low - room if low < 0 or low > room else 0.0), high + room


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Return at most `_MOST_POINTS` points: of each stretch the lowest and the highest, in their order."""
    size = -(-2 * len(points) // _MOST_POINTS)
    if size <= 2:
        return list(points)
    found = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        found += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return found


def _drawn(line: Line, points: Sequence[Point], scale: _Scale) -> Iterator[Markup]:
    if line.look == "marks":
        for x, y in points:
            path = Markup('<path class="mark" d="M{:.1f} {:.1f}l5 5l-5 5l-5-5z"><title>step {:g}: {:.4f}</title></path>')
            yield path.format(scale.x(x), scale.y(y) - 5, x, y)
        return
    places = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in points)
    yield Markup('<polyline class="{}" points="{}"/>').format(line.look, places)


def _axes(scale: _Scale, *, along: bool = True) -> Iterator[Markup]:
    for value in _round_values(scale.y0, scale.y1):
        y = scale.y(value)
        yield Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(_LEFT, scale.width - _RIGHT, y, y)
        yield Markup('<text x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(_LEFT - 6, y + 4, _figure(value))
    for value in _round_values(scale.x0, scale.x1) if along else ():
        if value == int(value):
            text = Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>')
            yield text.format(scale.x(value), scale.height - _BOTTOM + 18, f"{int(value):,}")


def _round_values(low: float, high: float) -> list[float]:
    """Return about `_TICKS` round figures from `low` to `high`.

    >>> _round_values(1.9, 4.3), _round_values(0, 30)
    ([2.0, 2.5, 3.0, 3.5, 4.0], [0.0, 10.0, 20.0, 30.0])
    """
    rough = (high - low) / _TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    apart = next(unit * step for step in (1, 2, 2.5, 5, 10) if unit * step >= rough * 0.99)
    first = math.ceil(low / apart - 1e-9)
    return [round(place * apart, 12) for place in range(first, math.floor(high / apart + 1e-9) + 1)]


def _figure(value: float) -> str:
    """Return an axis' figure, short.

    >>> _figure(2.5), _figure(0.0002), _figure(0.0)
    ('2.5', '2e-4', '0')
    """
    if value and abs(value) < 0.01:
        return f"{value:.2g}".replace("e-0", "e-") if "e" in f"{value:.2g}" else f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.6g}"


def _svg(parts: Sequence[Markup], width: int, height: int, title: str) -> Markup:
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(width, height, escape(title))
    return head + Markup("").join(parts) + Markup("</svg>")
