"""The loss plot: the only file that knows plotext.

plotext draws the frame, the ticks and the measured points. It is slow past a thousand points and raises on infinities, so
the curve is laid over its frame in dots: the range of the steps in a dot column, and the smoothed line over it. Non-finite
steps reach neither: they are marked on the bottom row and cannot bend an axis. The result is a `Text` that any Static can show.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.text import Text

from qlora_tui.tui import axes
from qlora_tui.tui.axes import nice_ticks
from qlora_tui.tui.braille import Canvas, glyph
from qlora_tui.tui.history import Bucket
from qlora_tui.tui.sight import Scale, Sight

__all__ = ["APART", "BAD", "EVAL", "RAW", "SMOOTH", "Look", "Series", "draw", "nice_ticks", "overlay"]

Colour = tuple[int, int, int]
RAW: Colour = (92, 107, 128)
SMOOTH: Colour = (86, 180, 233)
EVAL: Colour = (230, 159, 0)
BAD: Colour = (213, 94, 0)
APART: tuple[Colour, ...] = (SMOOTH, EVAL, (0, 158, 115), (204, 121, 167), BAD, (240, 228, 66))
"""Colours of several curves on one plot, told apart by most eyes (Okabe and Ito)."""
AXIS = "#7d8899"
MIN_WIDTH, MIN_HEIGHT = 16, 4

GLYPHS: Mapping[str, tuple[str, str, str]] = {
    "saved": ("▴", "C", AXIS),
    "warning": ("!", "!", "bold #e69f00"),
    "rate": ("L", "L", "bold #56b4e9"),
    "pause": ("P", "P", "bold #56b4e9"),
    "resume": ("R", "R", "bold #56b4e9"),
    "back": ("B", "B", "bold #d55e00"),
}
"""Marks on the axis, each later one over the earlier: glyph, its stand-in in ASCII, style."""


@dataclass(frozen=True, slots=True)
class Series:
    """What to draw: loss buckets, measured points (step, loss), and steps worth a mark on the axis, by kind.

    `whole` are the buckets of the whole run where `buckets` are a part of it: tokens and seconds are looked up there.
    """

    buckets: Sequence[Bucket]
    evals: Sequence[tuple[int, float]] = ()
    marks: Mapping[str, Sequence[int]] = field(default_factory=dict)
    last_step: int = 0
    whole: Sequence[Bucket] = ()


@dataclass(frozen=True, slots=True)
class Look:
    """How to draw it."""

    log_y: bool = False
    ascii_only: bool = False
    sight: Sight = field(default_factory=Sight)


@dataclass(frozen=True, slots=True)
class _Frame:
    """The axes of one drawing: x in what the axis counts, y in nats."""

    left: float
    right: float
    bottom: float
    top: float
    log_y: bool
    margin: int
    room: int
    x: Scale

    def y(self, value: float) -> float:
        held = min(max(value, self.bottom), self.top)
        return math.log10(held) if self.log_y else held

    def share(self, step: float) -> float:
        return (self.x.at(step) - self.left) / max(1e-9, self.right - self.left)

    def column(self, step: float) -> int:
        return self.margin + min(self.room - 1, max(0, round(self.share(step) * (self.room - 1))))

    def holds(self, step: float) -> bool:
        return -1e-9 <= self.share(step) <= 1 + 1e-9


def draw(series: Series, width: int, height: int, look: Look | None = None) -> Text:
    """Return the plot as `width` x `height` cells; words instead when there is nothing, or no room, to draw."""
    style = look or Look()
    if width < MIN_WIDTH or height < MIN_HEIGHT:
        return Text("")
    buckets, evals = series.buckets, [(step, loss) for step, loss in series.evals if math.isfinite(loss)]
    ends = buckets[:1] or [Bucket(step, step, 0, 0, (0, 0, 0, 0)) for step, _ in evals[:1]]
    if not ends:
        return _centred("the first step draws here", width, height)
    first = min([ends[0].first, *[step for step, _ in evals[:1]]])
    last = max([bucket.last for bucket in buckets[-1:]] + [step for step, _ in evals[-1:]])
    left, right = style.sight.edges(first, last, series.last_step)
    seen = [bucket for bucket in buckets if bucket.last >= left and bucket.first <= right]
    finite, points = [bucket for bucket in seen if bucket.high >= bucket.low], [one for one in evals if left <= one[0] <= right]
    if not finite and not points:
        bad = any(bucket.bad for bucket in seen)
        return _centred("no finite loss here: every step was NaN or infinite" if bad else "no step here yet", width, height)
    scale = Scale(style.sight.counts, series.whole or buckets)
    ranges = _y_axis(finite, points, style, height)
    words = axes.labels(ranges[3])
    margin = max(map(len, words)) + 1
    begin = scale.at(left)
    frame = _Frame(begin, max(scale.at(right), begin + 1e-6), *ranges[:3], margin, width - margin, scale)
    drawn = Text.from_ansi(_framed(frame, ranges[3], words, points, (width, height), style))
    return _marked(drawn, series, seen, frame, width, style)


def overlay(curves: Sequence[Sequence[Bucket]], width: int, height: int, letters: str = "", look: Look | None = None) -> Text:
    """Return the smoothed lines of several runs on one plot, by steps; with `letters`, each is drawn in its own instead of in dots."""
    style = look or Look()
    weight = style.sight.weight
    lines = [[(bucket.last, bucket.smooth[weight]) for bucket in curve if math.isfinite(bucket.smooth[weight])] for curve in curves]
    there = [line for line in lines if line]
    if not there or width < MIN_WIDTH or height < MIN_HEIGHT:
        return _centred("no step to draw", width, height)
    ranges = [axes.usual_range(*[[loss for _, loss in line]] * 2) for line in there]
    count = max(1, min(6, (height - 2) // 2))
    bottom, top = axes.padded(min(low for low, _ in ranges), max(high for _, high in ranges), count, log=False)
    ticks = nice_ticks(bottom, top, count)
    words = axes.labels(ticks)
    margin = max(map(len, words)) + 1
    left = min(line[0][0] for line in there)
    right = max(left + 1, *(line[-1][0] for line in there))
    frame = _Frame(left, right, bottom, top, False, margin, width - margin, Scale("step", ()))
    drawn = Text.from_ansi(_framed(frame, ticks, words, (), (width, height), style)).split("\n")
    rows = max((index for index, line in enumerate(drawn) if "└" in line.plain), default=0)
    for turn, line in enumerate(lines):
        canvas = Canvas(frame.room, rows, ascii_only=bool(letters))
        across, up = canvas.wide - 1, canvas.high - 1
        canvas.line([(min(across, round(frame.share(step) * across)), _height(loss, frame, up)) for step, loss in line])
        for index in range(rows):
            drawn[index] = _woven(drawn[index], canvas.row(index), frame.margin, (turn, len(lines)), letters)
    for index, text in enumerate(drawn):
        text.stylize_before(AXIS, 0, frame.margin if index < rows else len(text))
        text.truncate(width, pad=False)
        if style.ascii_only:
            text.plain = text.plain.translate(_ASCII_AXES)
    return Text("\n", no_wrap=True).join(drawn)


def _height(loss: float, frame: _Frame, tall: int) -> int:
    return round((frame.y(loss) - frame.bottom) / max(1e-12, frame.top - frame.bottom) * tall)


def _woven(line: Text, dots: Sequence[int], margin: int, turn: tuple[int, int], letters: str) -> Text:
    """Return a line of the frame with one more curve; where curves lie on each other they take turns from cell to cell."""
    mine, of = turn
    cells = list(line.plain.ljust(margin + len(dots)))
    taken = [at for at, dot in enumerate(dots, margin) if dot and (cells[at] in (" ", "\u2800") or at % of == mine)]
    line = line.copy()
    for at in taken:
        cells[at] = letters[mine] if letters else glyph(dots[at - margin])
    line.plain = "".join(cells)
    for at in taken:
        line.stylize(css(APART[mine % len(APART)]), at, at + 1)
    return line


def _y_axis(
    finite: Sequence[Bucket], points: Sequence[tuple[int, float]], look: Look, height: int
) -> tuple[float, float, bool, list[float]]:
    """Return bottom, top, whether it is logarithmic, and the ticks."""
    lows, highs = [bucket.low for bucket in finite], [bucket.high for bucket in finite]
    measured = [loss for _, loss in points]
    low, high = axes.usual_range(lows or measured, highs or measured, everything=look.sight.everything)
    if len(measured) < len(lows) or not lows:  # few points beside a curve: show them where that costs at most half the height
        reach = high - low if high > low else math.inf
        low = min([low, *[value for value in measured if low - value <= reach]])
        high = max([high, *[value for value in measured if value - high <= reach]])
    log_y = look.log_y and low > 0
    count = max(1, min(6, (height - 2) // 2))
    bottom, top = axes.padded(low, high, count, log=log_y)
    return bottom, top, log_y, axes.log_ticks(bottom, top) if log_y else nice_ticks(bottom, top, count)


def _framed(
    frame: _Frame, ticks: Sequence[float], words: Sequence[str], points: Sequence[tuple[int, float]], size: tuple[int, int], look: Look
) -> str:
    """Return what plotext draws: axes, ticks and the measured points, in escape sequences of its own."""
    import plotext  # 12 ms, and the wizard draws no plot

    plotext.clear_figure()
    plotext.limitsize(False, False)
    plotext.plotsize(*size)
    plotext.theme("clear")
    plotext.xaxes(True, False)
    plotext.yaxes(True, False)
    plotext.scatter([frame.left], [frame.y(frame.bottom)], marker=" ")  # without a point it draws no axes
    if points:
        marker = "E" if look.ascii_only else "◆"
        plotext.scatter([frame.x.at(step) for step, _ in points], [frame.y(loss) for _, loss in points], marker=marker, color=EVAL)
    plotext.xlim(frame.left, frame.right)
    plotext.ylim(frame.y(frame.bottom), frame.y(frame.top))
    plotext.yticks([frame.y(tick) for tick in ticks], words)
    count = max(2, size[0] // 16)
    if frame.x.counts == "step":
        found = [tick for tick in nice_ticks(frame.left, frame.right, count) if tick == int(tick)]
        plotext.xticks(found, [f"{int(tick):,}" for tick in found])
    else:
        found = (axes.time_ticks if frame.x.counts == "time" else nice_ticks)(frame.left, frame.right, count)
        plotext.xticks(found, [axes.passed(tick) if frame.x.counts == "time" else axes.amount(tick) for tick in found])
    return str(plotext.build())


def _curves(finite: Sequence[Bucket], frame: _Frame, rows: int, look: Look) -> tuple[Canvas, Canvas]:
    """Return the raw range and the smoothed line in dots; a column's range is that of all the steps in it."""
    raw, smooth = (Canvas(frame.room, rows, ascii_only=look.ascii_only) for _ in range(2))
    bottom, room = frame.y(frame.bottom), max(1e-12, frame.y(frame.top) - frame.y(frame.bottom))
    tall = raw.high - 1
    spans: dict[int, tuple[float, float, float]] = {}
    for bucket in finite:
        column = min(raw.wide - 1, max(0, round(frame.share(bucket.last) * (raw.wide - 1))))
        low, high, _ = spans.get(column, (math.inf, -math.inf, 0.0))
        spans[column] = (min(low, bucket.low), max(high, bucket.high), bucket.smooth[look.sight.weight])

    def dot(value: float) -> int:
        return round((frame.y(value) - bottom) / room * tall)

    way: list[tuple[int, int]] = []
    ordered = sorted(spans.items())
    for index, (column, (low, high, _)) in enumerate(ordered):
        ends = (dot(low), dot(high))
        raw.bar(column, *ends)
        way.append((column, ends[index % 2]))
    raw.line(way)
    smooth.line([(column, dot(value)) for column, (_, _, value) in ordered if math.isfinite(value)])
    return raw, smooth


def _laid_over(line: Text, raw: Sequence[int], smooth: Sequence[int], margin: int, look: Look) -> Text:
    """Return a line of the frame with the dots of both curves where it is empty; a cell that the smoothed one crosses is its alone."""
    plain = line.plain.ljust(margin + len(raw))
    cells = list(plain)
    styled: list[tuple[str, int]] = []
    for at, (under, over) in enumerate(zip(raw, smooth, strict=True), margin):
        if not (under or over) or cells[at] not in (" ", "\u2800"):
            continue
        cells[at] = ("*" if over else ":") if look.ascii_only else glyph(over or under)
        styled.append((css(SMOOTH if over else RAW), at))
    line = line.copy()
    line.plain = "".join(cells)
    for style, run in itertools.groupby(enumerate(styled), key=lambda one: (one[1][0], one[1][1] - one[0])):
        columns = [at for _, (_, at) in run]
        line.stylize(style[0], columns[0], columns[-1] + 1)
    return line


_ASCII_AXES = str.maketrans({"┤": "+", "│": "|", "└": "+", "─": "-", "┬": "+", "┼": "+", "\u2800": " "})


def _marked(drawn: Text, series: Series, seen: Sequence[Bucket], frame: _Frame, width: int, look: Look) -> Text:
    """Put what plotext does not know on its drawing: marks on the axis, non-finite and cut off steps, the crosshair."""
    lines = drawn.split("\n")
    axis = max((index for index, line in enumerate(lines) if "└" in line.plain), default=-1)
    if axis > 0:
        raw, smooth = _curves([bucket for bucket in seen if bucket.high >= bucket.low], frame, axis, look)
        for index in range(axis):
            lines[index] = _laid_over(lines[index], raw.row(index), smooth.row(index), frame.margin, look)
        finite, hair = [bucket for bucket in seen if bucket.high >= bucket.low], 1e-6 * (frame.top - frame.bottom)
        above = [frame.column(bucket.last) for bucket in finite if bucket.high > frame.top + hair]
        below = [frame.column(bucket.last) for bucket in finite if bucket.low < frame.bottom - hair]
        bad = [frame.column(bucket.last) for bucket in seen if bucket.bad]
        lines[0] = _put(lines[0], above, "^" if look.ascii_only else "▲", f"bold {css(EVAL)}")
        lines[axis - 1] = _put(lines[axis - 1], below, "v" if look.ascii_only else "▼", f"bold {css(EVAL)}")
        lines[axis - 1] = _put(lines[axis - 1], bad, "x" if look.ascii_only else "×", f"bold {css(BAD)}")
        for kind, (glyph, plain, style) in GLYPHS.items():
            at = [frame.column(step) for step in series.marks.get(kind, ()) if frame.holds(step)]
            lines[axis] = _put(lines[axis], at, plain if look.ascii_only else glyph, style)
    for index, line in enumerate(lines):
        line.stylize_before(AXIS, 0, frame.margin if index < axis or axis < 0 else len(line))
        line.truncate(width, pad=False)
    cross = look.sight.cross
    if cross is not None and axis > 0 and frame.holds(cross):
        for index in range(axis):
            lines[index] = _crossed(lines[index], frame.column(cross))
    if look.ascii_only:
        for line in lines:
            line.plain = line.plain.translate(_ASCII_AXES)
    return Text("\n", no_wrap=True).join(lines)


def _put(line: Text, columns: Sequence[int], mark: str, style: str) -> Text:
    if not columns:
        return line
    line = line.copy()
    cells = list(line.plain.ljust(max(columns) + 1))
    for at in columns:
        cells[at] = mark
    line.plain = "".join(cells)
    for at in set(columns):
        line.stylize(style, at, at + 1)
    return line


def _crossed(line: Text, at: int) -> Text:
    """Return the line with the crosshair in a column: a stroke where the cell is empty, its drawing turned over where it is not."""
    empty = line.plain[at : at + 1] in ("", " ", "\u2800")
    if empty:
        return _put(line, [at], "│", "bold")
    line = line.copy()
    line.stylize("reverse", at, at + 1)
    return line


def css(colour: Colour) -> str:
    """Return a colour as styles write it."""
    return f"#{colour[0]:02x}{colour[1]:02x}{colour[2]:02x}"


def _centred(sentence: str, width: int, height: int) -> Text:
    text = Text("\n" * ((height - 1) // 2), no_wrap=True)
    text.append(sentence[:width].center(width).rstrip(), style=AXIS)
    return text
