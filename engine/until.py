"""A time of day by which a run has to be done, kept through clocks that are set and machines that sleep.

The wall clock alone would end a run whose clock was corrected, and a steady clock alone would miss 07:00 by an hour
after the same correction. So both are read: where they part, somebody set the clock, and the time is worked out anew.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import datetime, timedelta

_FORMS = ("%H:%M", "%Y-%m-%d %H:%M")
_JUMP_SECONDS = 30.0
"""Two clocks part by less than this through the small corrections of a time server."""


def read(text: str) -> datetime:
    """Return `07:00` (on the first of January 1900) or `2026-11-28 07:00` as a local time.

    Raises:
        ValueError: it is neither.
    """
    for form in _FORMS:
        try:
            return datetime.strptime(text.strip(), form)
        except ValueError:
            continue
    raise ValueError(text)


def moment(text: str, now: float) -> float:
    """Return the Unix time that `text` means, seen from `now`: a time of day is the next one, a date is what it is.

    Local time as this machine has it, so that a night with a change to summer time ends at 07:00 all the same.
    """
    wanted, today = read(text), datetime.fromtimestamp(now)
    if wanted.year > 1900:
        return wanted.timestamp()
    due = today.replace(hour=wanted.hour, minute=wanted.minute, second=0, microsecond=0)
    return due.timestamp() if due > today else (due + timedelta(days=1)).timestamp()


def has_passed(text: str, now: float) -> bool:
    """Say whether the date that `text` means lies behind `now`; what is no time at all has not passed."""
    try:
        return moment(text, now) <= now
    except ValueError:  # the settings' own rules say so
        return False


def steady() -> float:
    """Return seconds on a clock that nobody sets and that goes on while the machine sleeps, where the system has one."""
    try:
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    except (AttributeError, OSError):  # not Linux: there the clock that stops in sleep has to do
        return time.monotonic()


class Deadline:
    """When a run has to be done; without a time it never has to."""

    def __init__(self, text: str, wall: Callable[[], float] = time.time, steady: Callable[[], float] = steady) -> None:
        """Work out the moment from now; `wall` and `steady` are the two clocks, in seconds."""
        self._text, self._wall, self._steady = text, wall, steady
        self._apart = wall() - steady()
        self._at = moment(text, wall()) if text else math.inf
        self._moved = 0.0

    def left(self) -> float:
        """Return the seconds left, negative once the time has passed."""
        now = self._wall()
        apart = now - self._steady()
        if self._text and abs(apart - self._apart) > _JUMP_SECONDS:
            self._moved += apart - self._apart
            self._at = moment(self._text, now)
        self._apart = apart
        return self._at - now

    def moved(self) -> float:
        """Return by how many seconds somebody set the clock since the last call, so that it can be told once."""
        moved, self._moved = self._moved, 0.0
        return moved
