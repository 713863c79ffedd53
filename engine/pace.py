"""Measured steps turned into the time of those to come: robust against a slow step, quick to follow a change, honest about spread.

Steps hold different rows, so each is fed with its work: what the arithmetic of a step expects of it, in any unit. Time is then
a line over work: a part that every step costs, such as Python and launches, and a part that grows with its tokens. Arithmetic only.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

Triple = tuple[float, float, float]
Point = tuple[float, float]
"""Work and seconds of one step."""

WARM = 1
"""Steps that warm kernels up and count for nothing."""
LEAST = 3
"""Measured steps from which anything is said."""
_WINDOW = 64
_FEW = 8  # steps with fewer points are judged by their rate alone: a line through them would turn with every new one
_BLOCK = 4  # steps that are alike because they follow each other: how much a machine's speed wanders shows between blocks
_NEWEST = 8
_SHIFT, _SURE = 0.04, 3.0  # a change of speed is believed from this share on, and from so many standard errors
_ALLOWED = 0.03  # of what nobody can know from steps so far
_FAR = 4.0  # deviations from where a step is no noise but an event, such as a recording or a stall
_LEAST_EVENT = 0.25  # of an ordinary step, as the excess of such an event
_HUBER = 1.5


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds of a step: `each` and `a_work` times its work; `spread` is a standard deviation of an ordinary one, in seconds."""

    each: float
    a_work: float
    spread: float

    def at(self, work: float) -> float:
        """Return the seconds of a step of `work`."""
        return self.each + self.a_work * work


@dataclass(slots=True)
class Pace:
    """The last steps of a run and what they say of the next ones."""

    _points: deque[Point] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    _rates: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    _steps: int = 0

    def feed(self, seconds: float, tokens: int, work: float | None = None) -> None:
        """Take in one optimizer step; the first of a run warms up and does not count.

        Args:
            seconds: what the step took of the clock, without measurements, saves and pauses beside it.
            tokens: real ones.
            work: what arithmetic expects of it; None: its tokens.
        """
        self._steps += 1
        load = tokens if work is None else work
        if self._steps <= WARM or not (0 < seconds < math.inf) or tokens <= 0 or not load > 0:
            return
        self._points.append((load, seconds))
        self._rates.append(tokens / seconds)

    @property
    def basis(self) -> str:
        """Say in words what the figure rests on."""
        return f"{statistics.median(self._rates):,.0f} tokens/s, median of {len(self._rates)} steps"

    @property
    def step_seconds(self) -> float | None:
        """Return what an ordinary step takes; None before three are measured."""
        return statistics.median(seconds for _, seconds in self._points) if len(self._points) >= LEAST else None

    def left(self, steps: int, work: float) -> Triple | None:
        """Return the seconds (low, mid, high) of `steps` more steps of together `work`; None before three steps are measured."""
        points = [*self._points]
        if len(points) < LEAST:
            return None
        if steps <= 0:
            return 0.0, 0.0, 0.0
        line = fit(points)
        middle = line.each * steps + line.a_work * work
        ratios = [seconds / line.at(load) for load, seconds in points if line.at(load) > 0]
        faster, slower, now = _shift(ratios, line.spread * steps / middle)
        more, most = _events(points, line, steps)
        off = min(0.9, _ALLOWED + 2 * _error(ratios, line.spread * steps / middle, steps))
        low, high = middle * min(faster, now) * (1 - off), middle * max(slower, now) * (1 + off)
        return low + more, middle * now + more, high + most


def fit(points: Sequence[Point]) -> Line:
    """Return the line through `points` that few far ones cannot move: least squares with Huber's weights, neither part below zero."""
    rate = statistics.median(seconds / load for load, seconds in points)
    line = Line(0.0, rate, _spread(points, Line(0.0, rate, 0.0)))
    for _ in range(6):
        weights = [_weight(seconds - line.at(load), line.spread) for load, seconds in points]
        line = _weighted(points, weights)
    return line


def _weighted(points: Sequence[Point], weights: Sequence[float]) -> Line:
    total = sum(weights)
    load = sum(weight * x for weight, (x, _) in zip(weights, points, strict=True)) / total
    took = sum(weight * y for weight, (_, y) in zip(weights, points, strict=True)) / total
    varied = sum(weight * (x - load) ** 2 for weight, (x, _) in zip(weights, points, strict=True)) / total
    both = sum(weight * (x - load) * (y - took) for weight, (x, y) in zip(weights, points, strict=True)) / total
    slope = both / varied if varied > (0.02 * load) ** 2 and len(points) >= _FEW else took / load
    slope = min(max(slope, 0.0), took / load)
    line = Line(took - slope * load, slope, 0.0)
    return Line(line.each, line.a_work, _spread(points, line))


def _spread(points: Sequence[Point], line: Line) -> float:
    """Return a standard deviation of what is left beside the line, by the median: 1.48 makes it that of a bell curve."""
    left = statistics.median(abs(seconds - line.at(load)) for load, seconds in points)
    return max(1.48 * left, 1e-4 * statistics.median(seconds for _, seconds in points))


def _weight(off: float, spread: float) -> float:
    return min(1.0, _HUBER * spread / abs(off)) if off else 1.0


def _shift(ratios: Sequence[float], spread: float) -> Triple:
    """Return how the newest steps compare with all: the least and the most to count with, and what to expect.

    A card that became hot or a machine that somebody else uses stays so for a while. What eight steps say is believed by
    half, since it may be over soon; what sixteen say, wholly.
    """
    if len(ratios) < 2 * _NEWEST:
        return 1.0, 1.0, 1.0
    newest = statistics.median(ratios[-_NEWEST:])
    before = statistics.median(ratios[-2 * _NEWEST : -_NEWEST])
    sure = max(_SHIFT, _SURE * spread / math.sqrt(_NEWEST))
    if abs(newest - 1) <= sure:
        return 1.0, 1.0, 1.0
    lasting = abs(before - 1) > sure and (before > 1) == (newest > 1)
    return min(1.0, newest), max(1.0, newest), newest if lasting else (1 + newest) / 2


def _events(points: Sequence[Point], line: Line, steps: int) -> tuple[float, float]:
    """Return the seconds that events such as recordings and stalls will add in `steps` steps: expected, and at most.

    One alone may never come again, so it only widens the range.
    """
    found = []
    for load, seconds in points:
        excess = seconds - line.at(load)
        if excess > max(_FAR * line.spread, _LEAST_EVENT * line.at(load)):
            found.append(excess)
    if not found:
        return 0.0, 0.0
    usual, times = statistics.median(found), steps / len(points)
    if len(found) == 1:
        return 0.0, times * min(usual, 2 * statistics.median(seconds for _, seconds in points))
    return times * len(found) * usual, times * (len(found) + 2 * math.sqrt(len(found))) * usual


def _error(ratios: Sequence[float], spread: float, steps: int) -> float:
    """Return the standard error of the sum of `steps` steps, as a share of it: of what was measured, and of what will come."""
    blocks = [statistics.median(ratios[start : start + _BLOCK]) for start in range(0, len(ratios) - _BLOCK + 1, _BLOCK)]
    wander = statistics.stdev(blocks) if len(blocks) > 2 else 0.0
    known = max(spread / math.sqrt(len(ratios)), wander / math.sqrt(max(1, len(blocks))))
    coming = max(spread / math.sqrt(steps), wander / math.sqrt(max(1.0, steps / _BLOCK)))
    return math.hypot(known, coming)
