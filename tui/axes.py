"""Axes: round ticks, their words, and a range that a few outliers cannot bend. Arithmetic only; nothing here draws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

WARM_UP = 0.05
"""The share of the first steps that does not count for what is usual: a loss falls steeply there."""
_ENOUGH = 40
_OUTLYING = 2.5
_TIMES = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 604800)


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Return round numbers between `low` and `high`, about `count` of them.

    >>> nice_ticks(1.13, 2.24, 4)
    [1.2, 1.4, 1.6, 1.8, 2.0, 2.2]
    """
    if not high > low or count < 1:
        return [low]
    return _multiples(low, high, _round_step((high - low) / count))


def time_ticks(low: float, high: float, count: int) -> list[float]:
    """Return whole seconds, minutes, hours or days between two moments, about `count` of them.

    >>> time_ticks(0, 5400, 4)
    [0.0, 1800.0, 3600.0, 5400.0]
    """
    if not high > low or count < 1:
        return [low]
    raw = (high - low) / count
    step = next((float(step) for step in _TIMES if step >= raw), 604800.0 * math.ceil(raw / 604800))
    return _multiples(low, high, step)


def log_ticks(bottom: float, top: float) -> list[float]:
    """Return 1, 2, 5 steps of ten within the range; plain ticks where it holds fewer than two."""
    powers = range(math.floor(math.log10(bottom)), math.ceil(math.log10(top)) + 1)
    found = [factor * 10.0**power for power in powers for factor in (1, 2, 5) if bottom <= factor * 10.0**power <= top]
    return found if len(found) >= 2 else nice_ticks(bottom, top, 4)


def labels(ticks: Sequence[float]) -> list[str]:
    """Return the words of loss ticks, all with as many digits as their distance needs.

    >>> labels([1.2, 1.4]), labels([2.0])
    (['1.2', '1.4'], ['2'])
    """
    if len(ticks) == 1:
        return [f"{ticks[0]:.4g}"]
    gap = min((abs(b - a) for a, b in itertools.pairwise(ticks)), default=1.0)
    digits = max(0, -math.floor(math.log10(gap) + 1e-9)) if gap > 0 else 2
    if digits > 6:
        return [f"{tick:.3g}" for tick in ticks]
    return [f"{tick:.{digits}f}" if abs(tick) < 1e6 else f"{tick:.3g}" for tick in ticks]


def amount(value: float) -> str:
    """Return a large count in few cells.

    >>> amount(1_500_000), amount(2_000), amount(40), amount(3.25e9)
    ('1.5M', '2k', '40', '3.25B')
    """
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def passed(seconds: float) -> str:
    """Return a moment of a run in few cells.

    >>> passed(90), passed(1800), passed(5400), passed(0), passed(172800)
    ('90s', '30m', '1.5h', '0', '2d')
    """
    for size, letter in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size and (seconds % size == 0 or seconds >= 2 * size or size == 3600):
            return f"{seconds / size:.3g}{letter}"
    return f"{seconds:.3g}s" if seconds else "0"


def usual_range(lows: Sequence[float], highs: Sequence[float], *, everything: bool = False) -> tuple[float, float]:
    """Return the lowest and highest of what to show: all of it, or where outliers would flatten it, what is usual.

    Usual is from the 1st to the 99th percentile of the buckets after the warm-up; it is taken only where the whole range
    is more than two and a half times as wide, so that an ordinary start stays in sight. Both sequences are in time's order.
    """
    low, high = min(lows), max(highs)
    if everything or len(highs) < _ENOUGH:
        return low, high
    start = int(len(highs) * WARM_UP)
    ranked_lows, ranked_highs = sorted(lows[start:]), sorted(highs[start:])
    left_out = math.ceil(len(ranked_highs) / 100)
    usual_low, usual_high = ranked_lows[left_out], ranked_highs[-1 - left_out]
    room = usual_high - usual_low
    if not room > 0 or high - low <= _OUTLYING * room:
        return low, high
    return max(low, usual_low - 0.1 * room), min(high, usual_high + 0.1 * room)


def padded(low: float, high: float, count: int, *, log: bool) -> tuple[float, float]:
    """Return the ends of an axis around `low` and `high`: on round numbers, so that it moves seldom, and a constant gets room.

    An axis of what is never negative does not go below zero, and a logarithmic one not down to it.
    """
    if not high > low:
        room = max(abs(high) * 0.1, 0.1)
        bottom, top = low - room, high + room
    else:
        step = _round_step((high - low) / max(1, count)) / 2
        bottom, top = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    if low > 0 and log:
        bottom = bottom if bottom > 0 else low * 0.9
    return (max(0.0, bottom) if low >= 0 else bottom), top


def _round_step(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.7)


def _multiples(low: float, high: float, step: float) -> list[float]:
    first = math.ceil(low / step - 1e-9)
    digits = max(0, 2 - math.floor(math.log10(step)))
    return [round((first + index) * step, digits) for index in range(int((high - first * step) / step + 1e-9) + 1)]
