"""A loss or gradient that is not a number: the step was not applied; three in a row end the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qlora_tui.engine.events import Finding, Stepped

IN_A_ROW = 3
SHARE, WINDOW = 0.01, 100
"""More than one in a hundred of the last hundred steps also ends the run."""


class NonFinite:
    """Speaks at every non-finite step, since each one is a step that taught nothing; cannot be switched off."""

    name = "non_finite"

    def __init__(self, *, total_steps: int, warmup_steps: int) -> None:
        """Start with nothing seen; the schedule does not matter here."""
        self._row = 0
        self._bad: list[int] = []

    def see(self, step: Stepped) -> Finding | None:
        """Warn at a non-finite step, stop at the third in a row or when they keep coming."""
        if math.isfinite(step.loss) and math.isfinite(step.grad_norm):
            self._row = 0
            return None
        self._row += 1
        self._bad = [past for past in self._bad if past > step.step - WINDOW] + [step.step]
        stop = self._row >= IN_A_ROW or len(self._bad) > SHARE * WINDOW + IN_A_ROW - 1
        what = "loss" if not math.isfinite(step.loss) else "gradient"
        advice = ("halve the learning rate", "warm up longer", "look at the rows of this step", "use bfloat16 or float32")
        numbers = {"loss": step.loss, "grad_norm": step.grad_norm, "in_a_row": self._row, "rows": list(step.rows)}
        message = f"the {what} is not a number; the step was not applied" + (f", {self._row} in a row" if self._row > 1 else "")
        return Finding(self.name, "stop" if stop else "warn", step.step, message, advice, numbers)

    def state(self) -> dict[str, Any]:
        """Return the running counts."""
        return {"row": self._row, "bad": self._bad}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the counts."""
        self._row, self._bad = int(state["row"]), [int(step) for step in state["bad"]]
