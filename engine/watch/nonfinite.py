"""A loss or gradient that is not a number: the step was not applied; three in a row end the run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from qlora_tui.engine.events import Finding, Stepped
from qlora_tui.engine.watch.advice import calmer
from qlora_tui.engine.watch.rule import Rule

IN_A_ROW = 3
MOST, WINDOW = 3, 100
"""More than so many of the last hundred steps also end the run."""


@dataclass
class NonFinite(Rule):
    """Speaks at every non-finite step, since each one is a step that taught nothing; cannot be switched off."""

    name: ClassVar[str] = "non_finite"
    rule: ClassVar[str] = f"loss and gradient norm are numbers; {IN_A_ROW} steps in a row, or {MOST + 1} of {WINDOW}, end the run"
    in_a_row: int = 0
    bad: list[int] = field(default_factory=list)

    def see(self, step: Stepped) -> Finding | None:
        """Warn at a non-finite step, stop at the third in a row or when they keep coming."""
        if math.isfinite(step.loss) and math.isfinite(step.grad_norm):
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        self.bad = [past for past in self.bad if past > step.step - WINDOW] + [step.step]
        stop = self.in_a_row >= IN_A_ROW or len(self.bad) > MOST
        what = "loss" if not math.isfinite(step.loss) else "gradient"
        advice = (*calmer(step.lr)[:2], "look at the rows of this step", "dtype=bfloat16 or float32: float16 overflows at 65,504")
        numbers = {
            "loss": step.loss,
            "grad_norm": step.grad_norm,
            "in_a_row": self.in_a_row,
            "of_last_100": len(self.bad),
            "rows": list(step.rows),
        }
        message = f"the {what} is not a number; the step was not applied" + (f", {self.in_a_row} in a row" if self.in_a_row > 1 else "")
        return self.found("stop" if stop else "warn", step.step, message, advice, numbers)
