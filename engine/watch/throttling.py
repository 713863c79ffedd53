"""A card that slows itself down, from the driver's own figures about once a second.

It is fed by the device sampler, not by the loop, and so it only tells: a hot card is no reason to lose a run.
"""

from __future__ import annotations

from collections import deque

from qlora_tui.engine.events import Device, Finding

WINDOW, ENOUGH, SHARE = 60, 20, 0.5
NAME = "throttling"
RULE = f"more than half of the last {WINDOW} looks at the card, and at least {ENOUGH}, name the same reason for slower clocks"
_HOT = ("hot", "hardware")


class Throttling:
    """Counts the reasons of the last minute; speaks once until it is over."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        self._reasons: deque[str] = deque(maxlen=WINDOW)
        self._told = ""

    def see(self, device: Device, step: int) -> Finding | None:
        """Look at one sample taken about `step`; heat is a warning, a power limit a note, since many cards always run at it."""
        self._reasons.append(device.throttle)
        if self._told and self._reasons.count(self._told) < SHARE / 2 * len(self._reasons):
            self._told = ""
        reason, times = device.throttle, self._reasons.count(device.throttle)
        if not reason or reason == self._told or times < max(ENOUGH, SHARE * len(self._reasons)):
            return None
        self._told = reason
        hot = any(word in reason for word in _HOT)
        numbers = {
            "rule": RULE,
            "reason": reason,
            "share": times / len(self._reasons),
            "temperature_c": device.temperature_c,
            "power_watts": device.power_watts,
            "power_limit_watts": device.power_limit_watts,
        }
        heat = f" at {device.temperature_c:.0f} °C" if device.temperature_c is not None else ""
        watts = (
            f" ({device.power_watts:.0f} of {device.power_limit_watts:.0f} W)"
            if device.power_watts is not None and device.power_limit_watts is not None
            else ""
        )
        message = f"the card slows itself down: {reason}{heat}{watts}, {times} of the last {len(self._reasons)} seconds"
        advice = (
            ("better air for the card", "a lower power limit costs little: nvidia-smi -pl") if hot else ("no harm: it runs at its limit",)
        )
        return Finding(NAME, "warn" if hot else "info", step, message, advice, numbers)
