"""Numbers as the screens show them: what `engine.units` has, and what only a screen needs."""

from __future__ import annotations

import math
import time

from qlora_tui.engine import units

_GIB = 1 << 30


def duration(seconds: float) -> str:
    """Return a length of time in its two largest units; a time that is not known says so.

    >>> duration(4800), duration(float("inf"))
    ('1 h 20 min', 'unknown')
    """
    return units.words(seconds) if math.isfinite(seconds) else "unknown"


def size(amount: float) -> str:
    """Return bytes in the unit that suits them, such as `86 MiB`."""
    return units.gib(amount)


def gib(amount: float, *, unit: bool = True) -> str:
    """Return bytes as `9.8 GiB`.

    >>> gib(10 * 1024**3), gib(1536 * 1024**2, unit=False)
    ('10.0 GiB', '1.5')
    """
    figure = f"{amount / _GIB:.1f}"
    return f"{figure} GiB" if unit else figure


def span(low: float, high: float) -> str:
    """Return a range of time in one unit where both ends share it.

    >>> span(1920, 2220), span(20, 130)
    ('32-37 min', '20 s - 2 min')
    """
    first, second = duration(low), duration(high)
    if first == second:
        return first
    a, b = first.split(" "), second.split(" ")
    return f"{a[0]}-{second}" if len(a) == len(b) == 2 and a[1] == b[1] else f"{first} - {second}"


def clock(moment: float, *, seconds: bool = False) -> str:
    """Return the local time of day of a Unix time."""
    return time.strftime("%H:%M:%S" if seconds else "%H:%M", time.localtime(moment))


def number(value: float, digits: int = 3) -> str:
    """Return a figure short enough for a status line; non-finite ones by name.

    >>> number(1.28412), number(0.0002), number(float("nan")), number(12345.6)
    ('1.284', '2e-04', 'NaN', '12,346')
    """
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if value and abs(value) < 10**-digits:
        return f"{value:.0e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}f}"
