"""A loss 2.0 nats above its robust baseline.

The baseline is the median of accepted steps, not an average that the spike itself would pull up; spread is
the scaled median absolute deviation, so noisy small batches do not cry wolf at every hard row.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from qlora_tui.engine.events import Finding, Stepped

WINDOW, ENOUGH = 64, 20
HARD_NATS = 2.0
DEVIATIONS = 6.0
TO_SIGMA = 1.4826
"""Turns a median absolute deviation into a standard deviation for normal noise."""


class Spike:
    """Warns when the loss jumps; says nothing in warm-up and before it has a baseline."""

    name = "spike"

    def __init__(self, *, total_steps: int, warmup_steps: int) -> None:
        """Start without a baseline; `warmup_steps` are not judged."""
        self._warmup = warmup_steps
        self._accepted: deque[float] = deque(maxlen=WINDOW)
        self._high = False

    def see(self, step: Stepped) -> Finding | None:
        """Warn once an episode; steps that spike never enter the baseline."""
        if step.skipped or not math.isfinite(step.loss) or step.step <= self._warmup:
            return None
        if len(self._accepted) < ENOUGH:
            self._accepted.append(step.loss)
            return None
        middle = statistics.median(self._accepted)
        sigma = TO_SIGMA * statistics.median(abs(loss - middle) for loss in self._accepted)
        limit = max(HARD_NATS, DEVIATIONS * sigma)
        rise = step.loss - middle
        if rise <= limit:
            self._accepted.append(step.loss)
            self._high = False
            return None
        if self._high:
            return None
        self._high = True
        advice = ("halve the learning rate (1e-4 is a safe value)", "warm up longer", "more rows a step", "look at the rows of this step")
        numbers = {"loss": step.loss, "baseline": middle, "limit": limit, "sigma": sigma, "rows": list(step.rows)}
        message = f"loss {step.loss:.2f} is {rise:.1f} nats above its median of {len(self._accepted)} steps"
        return Finding(self.name, "warn", step.step, message, advice, numbers)

    def state(self) -> dict[str, Any]:
        """Return the baseline window."""
        return {"accepted": list(self._accepted), "high": self._high}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a baseline window."""
        self._accepted = deque((float(loss) for loss in state["accepted"]), maxlen=WINDOW)
        self._high = bool(state["high"])
