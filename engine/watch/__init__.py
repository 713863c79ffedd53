"""Detectors of ill runs: one file each, plain numbers in, a finding or nothing out.

Each looks at one step in constant time and memory, and its state travels in the checkpoint, so a resumed run
judges exactly as an uninterrupted one. To add one: a file here, and its class in `DETECTORS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from qlora_tui.engine.events import Finding, Stepped
from qlora_tui.engine.watch.nonfinite import NonFinite
from qlora_tui.engine.watch.spike import Spike


class Detector(Protocol):
    """One symptom."""

    name: str

    def see(self, step: Stepped) -> Finding | None:
        """Look at one step; speak once an episode."""

    def state(self) -> dict[str, Any]:
        """Return what has to be remembered, as JSON can hold it."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""


DETECTORS: tuple[type[NonFinite] | type[Spike], ...] = (NonFinite, Spike)


class Watch:
    """All detectors together."""

    def __init__(self, total_steps: int, warmup_steps: int) -> None:
        """Start every detector afresh."""
        self._detectors: list[Detector] = [kind(total_steps=total_steps, warmup_steps=warmup_steps) for kind in DETECTORS]

    def see(self, step: Stepped) -> list[Finding]:
        """Return what the detectors say about `step`."""
        return [finding for detector in self._detectors if (finding := detector.see(step)) is not None]

    def state(self) -> dict[str, Any]:
        """Return the memory of every detector by name."""
        return {detector.name: detector.state() for detector in self._detectors}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; a detector that it does not name starts afresh."""
        for detector in self._detectors:
            if detector.name in state:
                detector.restore(state[detector.name])
