"""Held-out rows as a witness: when the training loss jumps, they tell an ill model from other rows.

The witness remembers the best measurement and where the training loss stood then. If held-out rows measured now are as good as
that, and have kept half of what training has gained since, the model is well and the rows changed.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from qlora_tui.engine.events import Evaluated, Finding, Stepped
from qlora_tui.engine.watch.advice import DATA, calmer
from qlora_tui.engine.watch.rule import HeldRow, Rolling, Rule, paired, usable

WINDOW, FIRST = 32, 8
ENOUGH = 8
RISE, ERRORS, KEPT, NO_GAIN = 0.1, 3.0, 0.5, 0.3


@dataclass
class Witness(Rule):
    """Keeps one measurement to compare with; says nothing by itself."""

    name: ClassVar[str] = "witness"
    rule: ClassVar[str] = (
        "held-out rows within max(0.1, 3 paired standard errors) of the best measurement, less half of what training gained beyond 0.3"
    )
    losses: Rolling = field(default_factory=lambda: Rolling(WINDOW))
    start: list[float] = field(default_factory=list)
    rows: list[float] = field(default_factory=list)
    loss: float | None = None
    train: float | None = None

    def see(self, step: Stepped) -> Finding | None:
        """Follow the training loss."""
        if usable(step):
            self.losses.add(step.loss)
            if len(self.start) < FIRST:
                self.start = [*self.start, step.loss]
        return None

    def measured(self, found: Evaluated, rows: Sequence[HeldRow]) -> Finding | None:
        """Remember the best measurement."""
        if rows and math.isfinite(found.loss) and (self.loss is None or found.loss < self.loss):
            self.rows, self.loss = [row.loss for row in rows], found.loss
            self.train = self.losses.median if found.step and len(self.losses) else None
        return None

    @property
    def present(self) -> bool:
        """Say whether there are enough rows to ask."""
        return len(self.rows) >= ENOUGH

    def testimony(self, rows: Sequence[HeldRow]) -> tuple[float, bool] | None:
        """Return by how many nats held-out rows are worse than at their best, and whether the model is well; None without a comparison."""
        losses = [row.loss for row in rows]
        if not self.present or len(losses) != len(self.rows) or not self.start:
            return None
        rise, error = paired(self.rows, losses)
        then = self.train if self.train is not None else statistics.median(self.start)
        gained = min(0.0, self.losses.median - then + NO_GAIN)
        return rise, rise <= max(RISE, ERRORS * error) + KEPT * gained


def cleared(finding: Finding, rise: float) -> Finding:
    """Return `finding` as a note: the model is well."""
    message = f"{finding.message}; held-out rows are as good as they were ({rise:+.2f} nats): the rows changed, not the model"
    return dataclasses.replace(finding, severity="info", message=message, advice=DATA, numbers={**finding.numbers, "held_rise": rise})


def confirmed(finding: Finding, rise: float) -> Finding:
    """Return `finding` as one to act on: the model is ill."""
    message = f"{finding.message}; held-out rows lost what they had gained ({rise:+.2f} nats against their best): it is the model"
    rate = finding.numbers.get("learning_rate")
    advice = finding.advice if rate is None else calmer(rate)
    return dataclasses.replace(finding, severity="stop", message=message, advice=advice, numbers={**finding.numbers, "held_rise": rise})
