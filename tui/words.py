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


def since(seconds: float) -> str:
    """Return how long something has lasted, as a clock that people watch: to the second below an hour.

    >>> since(0), since(50), since(130), since(4800)
    ('0 s', '50 s', '2 min 10 s', '1 h 20 min')
    """
    whole = max(0, int(seconds))
    if whole >= 3600:
        return duration(whole)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


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
    """Return a range of time in one unit, that of its high end, where both ends are near enough for that.

    >>> span(1920, 2220), span(90, 360), span(20, 40), span(112, 129), span(2690, 2710), span(3000, 9000)
    ('32-37 min', '2-6 min', '20-40 s', '112-129 s', '45 min', '50 min - 2 h 30 min')
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        return "unknown"
    first, last = max(1, round(low / 60)), round(high / 60)
    if high < 120 or (high < 300 and first == last):
        return f"{low:.0f}-{high:.0f} s"
    if high < 6000:
        return f"{last} min" if first == last else f"{first}-{last} min"
    return f"{duration(low)} - {duration(high)}"


def left(seconds: tuple[float, float, float]) -> tuple[str, str]:
    """Return a time left and its range, without saying the unit twice.

    >>> left((1920, 2040, 2220)), left((20, 30, 40)), left((3000, 6000, 9000))
    (('34 min', '32-37'), ('30 s', '20-40'), ('1 h 40 min', '50 min - 2 h 30 min'))
    """
    low, mid, high = seconds
    middle, around = duration(mid), span(low, high)
    for unit in (" min", " s"):
        if middle.endswith(unit) and around.endswith(unit) and middle.count(" ") == around.count(" ") == 1:
            return middle, around.removesuffix(unit)
    return middle, around


def clock(moment: float, *, seconds: bool = False) -> str:
    """Return the local time of day of a Unix time."""
    return time.strftime("%H:%M:%S" if seconds else "%H:%M", time.localtime(moment))


def device(name: str, room: int, *, kind: str = "cuda") -> str:
    """Return a device's name without the maker's words, cut at a space to fit `room`; nothing where no word fits.

    >>> device("NVIDIA GeForce RTX 4090", 12), device("NVIDIA H100 80GB HBM3", 9), device("AMD EPYC, 2 cores", 12, kind="cpu")
    ('RTX 4090', 'H100 80GB', 'AMD EPYC')
    """
    for maker in ("NVIDIA ", "GeForce ", "Tesla "):
        name = name.removeprefix(maker)
    if len(name) > room:
        name = name.split(",", 1)[0]
    while len(name) > room and " " in name:
        name = name.rsplit(" ", 1)[0].rstrip(",")
    if len(name) <= room:
        return name
    return kind.upper() if kind == "cpu" and room >= 3 else ""


def rate(value: float) -> str:
    """Return a learning rate as people write it, the same on every screen.

    >>> rate(2e-4), rate(1.66e-6), rate(0.0), rate(0.01)
    ('2e-4', '1.7e-6', '0', '0.01')
    """
    if not math.isfinite(value) or not value or abs(value) >= 1e-2:
        return f"{value:.2g}"
    figure, power = f"{value:.1e}".split("e")
    return f"{figure.removesuffix('.0')}e{int(power)}"


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
