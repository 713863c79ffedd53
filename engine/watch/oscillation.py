"""A loss that swings more and more: steps that overshoot, long before anything diverges."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from qlora_tui.engine.events import Finding, Stepped
from qlora_tui.engine.watch.advice import DATA, calmer
from qlora_tui.engine.watch.rule import Rolling, Rule, log_norm, usable

FROM, REFERENCE, WINDOW = 30, 100, 50
AFTER = 200
ROUGHER, LASTS = 2.0, 10
NORM_FACTOR = math.log(1.2)
_LEAST = 1e-3


@dataclass
class Oscillation(Rule):
    """Compares how far the loss moves from step to step with how far it moved early in the run."""

    name: ClassVar[str] = "oscillation"
    rule: ClassVar[str] = (
        "after step 200, the median step-to-step change of log loss over 50 steps is twice that of steps 30-130, ten times in a row, "
        "and the gradient norm rose by a fifth"
    )
    before: float | None = None
    seen: int = 0
    early: Rolling = field(default_factory=lambda: Rolling(REFERENCE))
    early_norms: Rolling = field(default_factory=lambda: Rolling(REFERENCE))
    late: Rolling = field(default_factory=lambda: Rolling(WINDOW))
    late_norms: Rolling = field(default_factory=lambda: Rolling(WINDOW))
    rough: int = 0
    told: bool = False
    told_data: bool = False

    def see(self, step: Stepped) -> Finding | None:
        """Judge the last 50 changes, once the early ones are known."""
        if not usable(step):
            return None
        self.seen += 1
        level = math.log(max(step.loss, _LEAST))
        change, self.before = abs(level - self.before) if self.before is not None else None, level
        if change is None or self.seen <= FROM:
            return None
        early = not self.early.full
        (self.early if early else self.late).add(change)
        if (norm := log_norm(step)) is not None:
            (self.early_norms if early else self.late_norms).add(norm)
        if early or not self.late.full or self.seen <= AFTER:
            return None
        reference, now = self.early.median, self.late.median
        self.rough = self.rough + 1 if now > ROUGHER * reference else 0
        still = now > (1 + ROUGHER) / 2 * reference
        self.told, self.told_data = self.told and still, self.told_data and still
        return self._tell(step, now / max(reference, _LEAST)) if self.rough >= LASTS and not self.told else None

    def _tell(self, step: Stepped, ratio: float) -> Finding | None:
        known = self.early_norms.full and self.late_norms.full
        rose = not known or self.late_norms.median - self.early_norms.median > NORM_FACTOR
        numbers = {"ratio": ratio, "limit": ROUGHER, "steps": WINDOW}
        message = f"the loss swings {ratio:.1f} times as far from step to step as it did early in the run"
        if rose:
            self.told = True
            return self.found("stop", step.step, message, calmer(step.lr), numbers)
        if self.told_data:
            return None
        self.told_data = True
        return self.found("info", step.step, f"{message}, and the gradient norm did not rise: look at the order of the rows", DATA, numbers)
