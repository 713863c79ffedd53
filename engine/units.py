"""Figures as people read them: seconds, bytes and counts in words. Code and JSON keep plain seconds and bytes."""

from __future__ import annotations

import math
import re

_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30


def words(seconds: float) -> str:
    """Return a time in its two largest units, rounded.

    >>> words(4800), words(3125), words(42), words(200_000)
    ('1 h 20 min', '52 min', '42 s', '2 d 8 h')
    """
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def gib(size: float) -> str:
    """Return bytes as GiB with one decimal, as MiB below one GiB, as KiB below one MiB.

    >>> gib(10_522_669_875), gib(83_886_080), gib(-2 * 2**30), gib(512)
    ('9.8 GiB', '80 MiB', '-2.0 GiB', '1 KiB')
    """
    sign, size = ("-", -size) if size < 0 else ("", size)
    if size >= _GIB - _MIB / 2:
        return f"{sign}{size / _GIB:.1f} GiB"
    if size >= _MIB - _KIB / 2:
        return f"{sign}{size / _MIB:.0f} MiB"
    return f"{sign}{-(-size // _KIB):.0f} KiB" if size else "0 KiB"


def count(number: int) -> str:
    """Return a whole number with its thousands apart.

    >>> count(2410), count(7), count(-1234567)
    ('2,410', '7', '-1,234,567')
    """
    return f"{number:,}"


def billions(number: int) -> str:
    """Return a count of weights as model cards write it.

    >>> billions(8_030_261_248), billions(134_515_008), billions(72_706_203_648)
    ('8.0 B', '135 M', '73 B')
    """
    if number >= 20_000_000_000:
        return f"{number / 1e9:.0f} B"
    if number >= 999_500_000:
        return f"{number / 1e9:.1f} B"
    return f"{number / 1e6:.0f} M" if number >= 9_950_000 else f"{number / 1e6:.1f} M"


def percent(share: float) -> str:
    """Return a share as a percentage, with a decimal only where it matters.

    >>> percent(0.256), percent(0.034), percent(1), percent(0)
    ('26 %', '3.4 %', '100 %', '0 %')
    """
    scaled = share * 100
    return f"{scaled:.1f} %" if 0 < abs(scaled) < 9.95 else f"{scaled:.0f} %"


_DURATION = re.compile(
    r"(?:(?P<d>\d+(?:\.\d+)?)\s*d)?\s*(?:(?P<h>\d+(?:\.\d+)?)\s*h)?\s*(?:(?P<m>\d+(?:\.\d+)?)\s*m(?:in)?)?\s*(?:(?P<s>\d+(?:\.\d+)?)\s*s)?"
)


def seconds(text: str) -> float:
    """Read a duration such as `2h`, `1h30m`, `90 min` or plain seconds.

    >>> seconds("1h30m"), seconds("90m"), seconds("45")
    (5400.0, 5400.0, 45.0)

    Raises:
        ValueError: the text is no duration.
    """
    raw = text.strip().lower()
    if re.fullmatch(r"\d+(?:\.\d+)?", raw) and math.isfinite(float(raw)):
        return float(raw)
    match = _DURATION.fullmatch(raw)
    if not raw or match is None:
        raise ValueError(text)
    units = {"d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0}
    return sum(float(match[unit]) * size for unit, size in units.items() if match[unit])
