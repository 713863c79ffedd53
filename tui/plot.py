"""The loss plot: the only file that knows plotext.

plotext is slow past a thousand points and raises on infinities, so it is fed at most two finite points a dot
column (the range of the steps in it). Non-finite steps never reach it: they are marked on the bottom row and
cannot bend an axis. The result is a `Text` that any Static can show.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import plotext
from rich.text import Text

from qlora_tui.tui.history import Bucket

Colour = tuple[int, int, int]
RAW: Colour = (92, 107, 128)
SMOOTH: Colour = (86, 180, 233)
EVAL: Colour = (230, 159, 0)
BAD: Colour = (213, 94, 0)
AXIS = "#7d8899"
MIN_WIDTH, MIN_HEIGHT = 16, 4


@dataclass(frozen=True, slots=True)
class Series:
    """What to draw: loss buckets, measured points (step, loss), and steps worth a tick on the axis."""

    buckets: Sequence[Bucket]
    evals: Sequence[tuple[int, float]] = ()
    checkpoints: Sequence[int] = ()
    last_step: int = 0


@dataclass(frozen=True, slots=True)
class Look:
    """How to draw it."""

    log_y: bool = False
    ascii_only: bool = False
    all_values: bool = False


def draw(series: Series, width: int, height: int, look: Look | None = None) -> Text:
    """Return the plot as `width` x `height` cells; words instead when there is nothing, or no room, to draw."""
    style = look or Look()
    finite = [bucket for bucket in series.buckets if bucket.high >= bucket.low]
    evals = [(step, loss) for step, loss in series.evals if math.isfinite(loss)]
    if width < MIN_WIDTH or height < MIN_HEIGHT:
        return Text("")
    if not finite and not evals:
        bad = any(bucket.bad for bucket in series.buckets)
        return _centred("no finite loss yet: every step so far was NaN or infinite" if bad else "the first step draws here", width, height)
    bottom, top = _range(finite, evals, style)
    log_y = style.log_y and bottom > 0
    left = min([bucket.first for bucket in series.buckets[:1]] + [step for step, _ in evals[:1]])
    right = max([bucket.last for bucket in series.buckets[-1:]] + [step for step, _ in evals[-1:]] + [series.last_step, left + 20])
    ticks = _log_ticks(bottom, top) if log_y else nice_ticks(bottom, top, max(2, min(6, height // 2)))
    labels = [_label(tick, ticks) for tick in ticks]
    columns = (width - max(map(len, labels), default=1) - 1) * (1 if style.ascii_only else 2)
    scale = _scale(log_y, bottom, top)
    _prepare(width, height)
    _plot_band(finite, left, right, columns, scale, style)
    _plot_points(evals, scale, style)
    plotext.xlim(left, right)
    plotext.ylim(scale(bottom), scale(top))
    plotext.yticks([scale(tick) for tick in ticks], labels)
    steps = [tick for tick in nice_ticks(left, right, max(2, width // 16)) if left <= tick <= right and tick == int(tick)]
    plotext.xticks(steps, [f"{int(tick):,}" for tick in steps])
    drawn = Text.from_ansi(plotext.build())
    return _marked(drawn, series, (left, right), max(map(len, labels), default=1) + 1, width, style)


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Return round numbers between `low` and `high`, about `count` of them.

    >>> nice_ticks(1.13, 2.24, 4)
    [1.2, 1.4, 1.6, 1.8, 2.0, 2.2]
    """
    if not high > low or count < 1:
        return [low]
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round((first + index) * step, 12) for index in range(int((high - first * step) / step + 1e-9) + 1)]


def _range(finite: Sequence[Bucket], evals: Sequence[tuple[int, float]], look: Look) -> tuple[float, float]:
    """Return the y range: padded, never negative for losses that are not, and not bent by a few early spikes."""
    lows = [bucket.low for bucket in finite] + [loss for _, loss in evals]
    highs = [bucket.high for bucket in finite] + [loss for _, loss in evals]
    low, high = min(lows), max(highs)
    if len(highs) >= 40 and not look.all_values:
        typical = sorted(highs)[int(len(highs) * 0.98)]
        if high - low > 3 * (typical - low) > 0:
            high = max([typical + 0.1 * (typical - low)] + [loss for _, loss in evals])
    pad = 0.04 * (high - low) if high > low else max(abs(high) * 0.1, 0.1)
    bottom = low - pad
    return (max(0.0, bottom) if low >= 0 and not (look.log_y and low > 0) else low if low > 0 else bottom), high + pad


def _scale(log_y: bool, bottom: float, top: float) -> _Scale:
    return _Scale(log_y, bottom, top)


@dataclass(frozen=True, slots=True)
class _Scale:
    log_y: bool
    bottom: float
    top: float

    def __call__(self, value: float) -> float:
        held = min(max(value, self.bottom), self.top)
        return math.log10(held) if self.log_y else held


def _prepare(width: int, height: int) -> None:
    plotext.clear_figure()
    plotext.limitsize(False, False)
    plotext.plotsize(width, height)
    plotext.theme("clear")
    plotext.xaxes(True, False)
    plotext.yaxes(True, False)


def _plot_band(finite: Sequence[Bucket], left: int, right: int, columns: int, scale: _Scale, look: Look) -> None:
    """Draw the raw range, then the smoothed line over it; two points a column at most."""
    spans: dict[int, tuple[float, float, float]] = {}
    width = max(1, right - left)
    for bucket in finite:
        column = round((bucket.last - left) / width * (columns - 1))
        low, high, _ = spans.get(column, (math.inf, -math.inf, 0.0))
        spans[column] = (min(low, bucket.low), max(high, bucket.high), bucket.smooth)
    xs: list[float] = []
    ys: list[float] = []
    for index, (column, (low, high, _)) in enumerate(sorted(spans.items())):
        step = left + column * width / max(1, columns - 1)
        pair = (low, high) if index % 2 else (high, low)
        xs += [step, step]
        ys += [scale(pair[0]), scale(pair[1])]
    smooth = [(left + column * width / max(1, columns - 1), value) for column, (_, _, value) in sorted(spans.items())]
    if xs:
        plotext.plot(xs, ys, marker=":" if look.ascii_only else "braille", color=RAW)
    if smooth:
        line = "*" if look.ascii_only else "braille"
        plotext.plot([x for x, _ in smooth], [scale(y) for _, y in smooth], marker=line, color=SMOOTH)


def _plot_points(evals: Sequence[tuple[int, float]], scale: _Scale, look: Look) -> None:
    if evals:
        marker = "E" if look.ascii_only else "◆"
        plotext.scatter([step for step, _ in evals], [scale(loss) for _, loss in evals], marker=marker, color=EVAL)


_ASCII_AXES = str.maketrans({"┤": "+", "│": "|", "└": "+", "─": "-", "┬": "+", "┼": "+"})


def _marked(drawn: Text, series: Series, span: tuple[int, int], margin: int, width: int, look: Look) -> Text:
    """Put non-finite steps on the bottom row and checkpoints on the axis, and colour what plotext left plain."""
    lines = drawn.split("\n")
    axis = max((index for index, line in enumerate(lines) if "└" in line.plain), default=-1)
    left, right = span
    room = width - margin

    def column(step: int) -> int:
        return margin + min(room - 1, max(0, round((step - left) / max(1, right - left) * (room - 1))))

    if axis > 0:
        bad = [column(bucket.last) for bucket in series.buckets if bucket.bad]
        lines[axis - 1] = _put(lines[axis - 1], bad, "x" if look.ascii_only else "×", f"bold {_css(BAD)}")
        kept = [column(step) for step in series.checkpoints if left <= step <= right]
        lines[axis] = _put(lines[axis], kept, "^" if look.ascii_only else "▴", AXIS)
    for index, line in enumerate(lines):
        line.stylize_before(AXIS, 0, margin if index < axis or axis < 0 else len(line))
        line.truncate(width, pad=False)
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
    for at in columns:
        line.stylize(style, at, at + 1)
    return line


def _css(colour: Colour) -> str:
    return f"#{colour[0]:02x}{colour[1]:02x}{colour[2]:02x}"


def _label(tick: float, ticks: Sequence[float]) -> str:
    if len(ticks) == 1:
        return f"{tick:.4g}"
    gap = min((abs(b - a) for a, b in itertools.pairwise(ticks)), default=1.0)
    digits = min(6, max(0, -math.floor(math.log10(gap) + 1e-9))) if gap > 0 else 2
    return f"{tick:.{digits}f}" if abs(tick) < 1e6 else f"{tick:.1e}"


def _log_ticks(bottom: float, top: float) -> list[float]:
    """Return 1, 2, 5 steps of ten within the range; plain ticks where it holds fewer than two."""
    powers = range(math.floor(math.log10(bottom)), math.ceil(math.log10(top)) + 1)
    found = [factor * 10.0**power for power in powers for factor in (1, 2, 5) if bottom <= factor * 10.0**power <= top]
    return found if len(found) >= 2 else nice_ticks(bottom, top, 4)


def _centred(sentence: str, width: int, height: int) -> Text:
    text = Text("\n" * ((height - 1) // 2), no_wrap=True)
    text.append(sentence[:width].center(width).rstrip(), style=AXIS)
    return text
