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
_NEWEST, _LASTING = 8, 16  # steps from which a change of speed is seen, and from which those before it no longer count
_SHIFT, _SURE = 0.04, 4.0  # a change of speed is believed from this share on, and from so many standard errors
_ALLOWED = 0.03  # of what nobody can know from steps so far
_FAR = 4.0  # deviations from where a step is no noise but an event, such as a recording or a stall
_LEAST_EVENT = 0.25  # of an ordinary step, as the excess of such an event
_HUBER = 1.5
_STILL_WARMING = 1.12  # times what is usual that a run's first steps take while kernels are chosen and caches fill


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

    def ordinary(self, work: float) -> float | None:
        """Return what an ordinary step of `work` takes; None before three are measured."""
        return fit([*self._points]).at(work) if len(self._points) >= LEAST else None

    def left(self, steps: int, work: float) -> Triple | None:
        """Return the seconds (low, mid, high) of `steps` more steps of together `work`; None before three steps are measured."""
        if len(self._points) < LEAST:
            return None
        if steps <= 0:
            return 0.0, 0.0, 0.0
        points, line = _warmed([*self._points])
        newest = changed(_ratios(points, line))
        if newest >= _LASTING:
            points, newest = points[-newest:], 0
            line = fit(points)
        ratios, middle = _ratios(points, line), line.each * steps + line.a_work * work
        faster, now, slower = _since(ratios, newest)
        if newest:  # what is left beside the two speeds; slow steps in a row are a change, and no events
            points = points[:-newest]
            ratios = _apart(ratios, newest)
        least, more, most = _events(points, line, steps)
        off = min(0.9, _ALLOWED + 2 * _error(ratios, line.spread * steps / middle, steps))
        return middle * faster * (1 - off) + least, middle * now + more, middle * slower * (1 + off) + most


def fit(points: Sequence[Point]) -> Line:
    """Return the line through `points` that few far ones cannot move: least squares with Huber's weights, neither part below zero."""
    rate = statistics.median(seconds / load for load, seconds in points)
    line = Line(0.0, rate, _spread(points, Line(0.0, rate, 0.0)))
    for _ in range(6):
        weights = [_weight(seconds - line.at(load), line.spread) for load, seconds in points]
        line = _weighted(points, weights)
    return line


def _warmed(points: list[Point]) -> tuple[list[Point], Line]:
    """Return the points without slow ones at their beginning, at most half of them, and the line through the rest."""
    line, most = fit(points), len(points) // 2
    for _ in range(3):  # a line that slow steps have lifted hides the last of them
        slow = next((at for at, (load, seconds) in enumerate(points) if seconds <= _STILL_WARMING * line.at(load)), 0)
        slow = min(slow, most)
        if not slow:
            break
        points, most = points[slow:], most - slow
        line = fit(points)
    return points, line


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
    """Return a standard deviation of what is left beside the line that no event can move.

    By the median, and by the mean of the smaller three quarters, since a median of few is often too small; 1.48 and 2.1 make them
    those of a bell curve.
    """
    left = sorted(abs(seconds - line.at(load)) for load, seconds in points)
    most = max(1.48 * statistics.median(left), 2.1 * statistics.fmean(left[: -(-3 * len(left) // 4)]))
    return max(most, 1e-4 * statistics.median(seconds for _, seconds in points))


def _weight(off: float, spread: float) -> float:
    return min(1.0, _HUBER * spread / abs(off)) if off else 1.0


def changed(ratios: Sequence[float]) -> int:
    """Return how many of the newest steps are of another speed than those before; 0 where nothing speaks for a change.

    Of all places where it may have been the likeliest is taken: where both sides lie closest around their medians.
    """
    places = range(_NEWEST, len(ratios) - _BLOCK + 1, _BLOCK)
    if not places:
        return 0
    newest = min(places, key=lambda place: sum(abs(ratio - 1) for ratio in _apart(ratios, place)))
    old, new = statistics.median(ratios[:-newest]), statistics.median(ratios[-newest:])
    left = 1.48 * statistics.median(abs(ratio - 1) for ratio in _apart(ratios, newest))
    error = max(left, 0.01) * math.sqrt(1 / newest + 1 / (len(ratios) - newest))
    return newest if abs(new / old - 1) > max(_SHIFT, _SURE * error) else 0


def _since(ratios: Sequence[float], newest: int) -> Triple:
    """Return the speed from now on against that of all steps: the least, the expected and the most.

    A card that became hot, or a machine that somebody else uses, stays so for a while, and may soon be itself again: so few steps
    are believed in part. Many are the only ones that count, and do not come here.
    """
    if not newest:
        return 1.0, 1.0, 1.0
    old, new = statistics.median(ratios[:-newest]), statistics.median(ratios[-newest:])
    now = old + newest / _LASTING * (new - old)
    return min(old, new), now, max(old, new)


def _ratios(points: Sequence[Point], line: Line) -> list[float]:
    return [seconds / line.at(load) for load, seconds in points]


def _apart(ratios: Sequence[float], newest: int) -> list[float]:
    """Return the ratios of both sides of a change, each against its own median."""
    old, new = statistics.median(ratios[:-newest]), statistics.median(ratios[-newest:])
    return [*(ratio / old for ratio in ratios[:-newest]), *(ratio / new for ratio in ratios[-newest:])]


def _events(points: Sequence[Point], line: Line, steps: int) -> Triple:
    """Return the seconds that events such as recordings and stalls will add in `steps` steps: at least, expected, and at most.

    One alone may never come again, so it only widens the range. How often they come is as sure as a count is.
    """
    found = []
    for load, seconds in points:
        excess = seconds - line.at(load)
        if excess > max(_FAR * line.spread, _LEAST_EVENT * line.at(load)):
            found.append(excess)
    if not found:
        return 0.0, 0.0, 0.0
    usual, times, often = statistics.fmean(found), steps / len(points), len(found)
    if often == 1:
        return 0.0, 0.0, times * min(usual, 2 * statistics.median(seconds for _, seconds in points))
    unsure = 2 * math.sqrt(often)
    return times * max(0.0, often - unsure) * usual, times * often * usual, times * (often + unsure) * usual


def _error(ratios: Sequence[float], spread: float, steps: int) -> float:
    """Return the standard error of the sum of `steps` steps, as a share of it: of what was measured, and of what will come."""
    blocks = [statistics.median(ratios[start : start + _BLOCK]) for start in range(0, len(ratios) - _BLOCK + 1, _BLOCK)]
    wander = statistics.stdev(blocks) if len(blocks) > 2 else 0.0
    known = max(spread / math.sqrt(len(ratios)), wander / math.sqrt(max(1, len(blocks))))
    coming = max(spread / math.sqrt(steps), wander / math.sqrt(max(1.0, steps / _BLOCK)))
    return math.hypot(known, coming)
