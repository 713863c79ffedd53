"""What may hold up or end training between steps, other than people: time, and heat."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from qlora_tui.engine import machine
from qlora_tui.engine.events import Finding
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.units import words
from qlora_tui.engine.until import Deadline

_COOLER_BY = 5.0
"""Degrees below the limit at which training goes on: at the limit itself it would stop and go with every step."""
_RECENT_STEPS = 8
SAVING_SECONDS = 20.0
"""Kept free before a time of day for the last checkpoint, the adapter and the report."""


@dataclass(slots=True)
class Limits:
    """Time and heat of one attempt; the clocks and the sensor can be replaced in tests."""

    run: RunConfig
    deadline: Deadline
    temperature: Callable[[], float | None] = field(default_factory=lambda: machine.temperature)
    wait: Callable[[float], object] = time.sleep

    def up(self, trained_seconds: float, timed: Sequence[tuple[int, int, float]], measuring_seconds: float) -> bool:
        """Say whether the run has to end here.

        Args:
            trained_seconds: since training began; 0 before the first step of an attempt, which is always taken.
            timed: the steps so far; the third of each is its seconds.
            measuring_seconds: what measuring the hold-out takes. With `until` the last measurement has to be done by then too.
        """
        if not trained_seconds:
            return False
        if self.run.max_time and trained_seconds >= self.run.max_time:
            return True
        step = max((seconds for _, _, seconds in timed[-_RECENT_STEPS:]), default=0.0)
        return self.deadline.left() < step + measuring_seconds + SAVING_SECONDS

    def clock(self, step: int) -> Iterator[Finding]:
        """Tell of a clock that was set, where it matters."""
        if moved := self.deadline.moved():
            told = f"the clock was set {'forward' if moved > 0 else 'back'} by {words(abs(moved))}"
            left = self.deadline.left()
            message = f"{told}: until {self.run.until} there is {words(left)} now"
            yield Finding("clock", "info", step, message, (), {"moved_seconds": moved, "left_seconds": left})

    def heat(self) -> float | None:
        """Return the device's degrees if they are above `max_temperature`, else None."""
        limit = self.run.max_temperature
        hot = self.temperature() if limit else None
        return None if hot is None or hot <= limit else hot

    def cooled(self, degrees: float | None) -> bool:
        """Say whether training may go on at so many degrees; a sensor that stops answering ends the wait: a run must not hang on it."""
        return degrees is None or degrees <= self.run.max_temperature - _COOLER_BY

    def too_hot(self, step: int, hot: float) -> Finding:
        """Return what is said when a pause for heat begins."""
        limit = self.run.max_temperature
        message = f"paused: the device has {hot:.0f} °C and max_temperature is {limit:g}; training goes on at {limit - _COOLER_BY:g}"
        advice = (
            "look at the fans and at what else heats this machine",
            "a lower power limit (nvidia-smi -pl) costs less time than pauses",
        )
        return Finding("temperature", "warn", step, message, advice, {"temperature_c": hot, "limit_c": limit})

    def cool(self, step: int, now: float | None, seconds: float) -> Finding:
        """Return what is said when it ends."""
        told = "the sensor no longer answers" if now is None else f"the device has {now:.0f} °C"
        return Finding("temperature", "info", step, f"{told}: the pause ends after {words(seconds)}", (), {"temperature_c": now})
