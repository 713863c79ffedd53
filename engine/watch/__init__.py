"""Detectors of ill runs: one file each, plain numbers in, a finding or nothing out.

Each looks at one step in constant time and memory, and its state travels in the checkpoint, so a resumed run
judges exactly as an uninterrupted one. To add one: a file here, and its class in `DETECTORS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from qlora_tui.engine.events import Evaluated, Finding, Stepped
from qlora_tui.engine.spec import WATCH_STOP
from qlora_tui.engine.watch.datawait import DataWait
from qlora_tui.engine.watch.drift import Drift
from qlora_tui.engine.watch.gradient import Gradient
from qlora_tui.engine.watch.memorisation import Memorisation
from qlora_tui.engine.watch.nonfinite import NonFinite
from qlora_tui.engine.watch.notlearning import NotLearning
from qlora_tui.engine.watch.oscillation import Oscillation
from qlora_tui.engine.watch.overfitting import Overfitting
from qlora_tui.engine.watch.rule import HeldRow, Rule, Setting
from qlora_tui.engine.watch.spike import Spike
from qlora_tui.engine.watch.throughput import Throughput
from qlora_tui.engine.watch.witness import Witness, cleared, confirmed

__all__ = ["DETECTORS", "HeldRow", "Setting", "Watch"]

Action = Literal["tell", "stop", "roll_back"]

DETECTORS: tuple[type[Rule], ...] = (
    NonFinite,
    Spike,
    Drift,
    Oscillation,
    Gradient,
    Overfitting,
    Memorisation,
    NotLearning,
    Throughput,
    DataWait,
)


CLEARABLE = frozenset({Spike.name, Drift.name})
"""What a change of the data can look like."""
MOST_HELD = 500
"""More held-out rows are not remembered: their paired standard error is small enough, and memory stays constant."""


class Watch:
    """All detectors together, and what the user wants done when one of them is sure."""

    def __init__(self, setting: Setting, stop: Iterable[str] = WATCH_STOP, roll_back: Iterable[str] = ()) -> None:
        """Start every detector afresh; those named in `roll_back` go before those in `stop`."""
        self._witness = Witness(setting)
        self._rules = [self._witness, *(kind(setting) for kind in DETECTORS)]
        self._roll_back = frozenset(roll_back)
        self.acting = frozenset({NonFinite.name, *stop, *self._roll_back})
        """The detectors that do more than tell."""

    def see(self, step: Stepped) -> list[Finding]:
        """Return what the detectors say about `step`."""
        return self._settled(rule.see(step) for rule in self._rules)

    def measured(self, found: Evaluated, rows: Sequence[HeldRow] = ()) -> list[Finding]:
        """Return what the detectors say about a measurement; `rows` in the same order at every one."""
        return self._settled(rule.measured(found, rows[:MOST_HELD]) for rule in self._rules)

    def adapter(self, step: int, zero: Sequence[str], total: int) -> list[Finding]:
        """Return what there is to say about the `zero` ones of `total` adapter layers whose B is still zero at `step`."""
        return self._settled(rule.adapter(step, zero, total) for rule in self._rules if isinstance(rule, NotLearning))

    def asks_holdout(self, found: Iterable[Finding]) -> bool:
        """Say whether a measurement made now would decide about one of `found`."""
        return self._witness.present and any(self._open(item) for item in found)

    def weighed(self, found: Sequence[Finding], rows: Sequence[HeldRow]) -> list[Finding]:
        """Return findings in the light of held-out rows measured just now."""
        told = self._witness.testimony(rows[:MOST_HELD])
        if told is None:
            return list(found)
        rise, well = told
        opened = {item.detector: item.step for item in found if self._open(item)}
        for rule in self._rules:
            if well and rule.name in opened:
                rule.cleared(opened[rule.name])
        return [(cleared if well else confirmed)(item, rise) if self._open(item) else item for item in found]

    def action(self, finding: Finding) -> Action:
        """Return what is to be done about a finding."""
        if finding.severity != "stop":
            return "tell"
        return "roll_back" if finding.detector in self._roll_back else "stop"

    def state(self) -> dict[str, Any]:
        """Return the memory of every detector by name."""
        return {rule.name: rule.state() for rule in self._rules}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; a detector that it does not name starts afresh."""
        for rule in self._rules:
            if rule.name in state:
                rule.restore(state[rule.name])

    def _open(self, finding: Finding) -> bool:
        """Say whether held-out rows decide about a finding: one to act on, or one that only a calm gradient speaks against."""
        grave = finding.severity == "stop" or bool(finding.numbers.get("calm"))
        return grave and finding.detector in CLEARABLE and finding.detector in self.acting

    def _settled(self, found: Iterable[Finding | None]) -> list[Finding]:
        """Turn "sure enough to act" into a warning where the user only wants to be told."""
        return [
            finding if finding.severity != "stop" or finding.detector in self.acting else dataclasses.replace(finding, severity="warn")
            for finding in found
            if finding is not None
        ]
