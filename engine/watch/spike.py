"""A loss 2.0 nats above its robust baseline, more than once.

The baseline is the median of accepted steps, not an average that the spike itself would pull up; spread is the scaled median
absolute deviation, so noisy small batches do not cry wolf at every hard row. One step alone is told and never acted on. A loss
that rises while the gradient norm stays where it was is another kind of row, not an ill model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from qlora_tui.engine.events import Finding, Stepped
from qlora_tui.engine.watch.advice import CALM, DATA, calmer
from qlora_tui.engine.watch.rule import Rolling, Rule, log_norm, usable

WINDOW, NEWEST, FIRST, ENOUGH = 64, 24, 3, 20
HARD_NATS, SOFT_NATS = 2.0, 0.5
DEVIATIONS, SINGLE_DEVIATIONS = 6.0, 10.0
SMALL_BATCH = 4
GIVE_UP = 48
"""So many high steps in a row are the new baseline: whatever happened was told."""
QUIET = 50
"""Single hard steps are told at most once in so many."""
ASK_AGAIN = 20
"""Steps until held-out rows are measured again after they spoke against a finding: each time costs an evaluation."""
NORM_DEVIATIONS, NORM_FACTOR = 3.0, math.log(1.5)
_ALL_THE_WAY = 10.0


@dataclass
class Spike(Rule):
    """Acts on a jump that stays; tells single hard steps with their rows, and changes of the data as such."""

    name: ClassVar[str] = "spike"
    rule: ClassVar[str] = (
        "loss over the median of accepted steps by max(2.0, 6 deviations) twice in a row (before 20 steps: doubled), or by max(0.5, 6 "
        "deviations) three times (one time more below four rows a step), and the gradient norm of these steps left its median by 3 "
        "standard errors and a factor 1.5; held-out rows, where there are any, have the last word"
    )
    accepted: Rolling = field(default_factory=lambda: Rolling(WINDOW))
    norms: Rolling = field(default_factory=lambda: Rolling(WINDOW))
    hard: int = 0
    soft: int = 0
    outside: int = 0
    moved: float = 0.0
    told: bool = False
    told_data: bool = False
    rows: list[int] = field(default_factory=list)
    quiet_until: int = 0
    asked_until: int = 0

    def see(self, step: Stepped) -> Finding | None:
        """Judge one step against the steps before it; steps that spike never enter the baseline."""
        if not usable(step):
            return None
        if len(self.accepted) < FIRST:
            self._accept(step)
            return None
        middle, sigma = self.accepted.falling(NEWEST)
        rise, limit = step.loss - middle, self._limit(middle, sigma)
        hard = rise > limit
        settled = len(self.accepted) >= ENOUGH and step.step > self.setting.warmup_steps
        if not hard and not (settled and rise > max(SOFT_NATS, DEVIATIONS * sigma)):
            self._accept(step)
            return None
        self.hard, self.soft, self.outside = (self.hard + 1 if hard else 0), self.soft + 1, self.outside + 1
        self.moved += self._moved(step)
        self.rows = [*self.rows, *step.rows][:64]
        numbers = {"loss": step.loss, "baseline": middle, "sigma": sigma, "limit": limit}
        found = self._judge(step, rise, numbers | {"grad_norm": step.grad_norm, "in_a_row": self.soft, "rows": list(self.rows)}, hard=hard)
        if self.outside >= GIVE_UP:
            self.accepted.clear()
            self._accept(step)
        return found

    def _limit(self, middle: float, sigma: float) -> float:
        """Return the nats that make a step hard; a few first steps say little of their spread, so there the loss has to double."""
        if len(self.accepted) < ENOUGH:
            return max(HARD_NATS, middle * (2 if self.setting.rows_per_step < SMALL_BATCH else 1))
        return max(HARD_NATS, DEVIATIONS * sigma)

    def _judge(self, step: Stepped, rise: float, numbers: dict[str, object], *, hard: bool) -> Finding | None:
        careful = self.setting.rows_per_step < SMALL_BATCH
        lasting = self.hard >= 2 + careful or self.soft >= 3 + careful
        over = f"loss {step.loss:.2f} is {rise:.1f} nats above its median of {len(self.accepted)} steps"
        spread = self.norms.sigma if len(self.norms) else 0.0
        moved = abs(self.moved) / self.outside > max(NORM_DEVIATIONS * spread / self.outside**0.5, NORM_FACTOR)
        if lasting and moved and not self.told and step.step >= self.asked_until:
            self.told = True
            return self.found("stop", step.step, f"{over}, {self.soft} steps in a row", calmer(step.lr), numbers)
        if lasting and not moved and not self.told_data:
            self.told_data = True
            message = f"{over}, {self.soft} steps in a row, {CALM}"
            return self.found("info", step.step, message, DATA, numbers | {"calm": True, "learning_rate": step.lr})
        if hard and rise > SINGLE_DEVIATIONS * self.accepted.sigma and self.hard == 1 and not lasting and step.step >= self.quiet_until:
            self.quiet_until = step.step + QUIET
            return self.found("info", step.step, f"{over}, once", ("look at the rows of this step",), numbers)
        return None

    def cleared(self, step: int) -> None:
        """Be quiet for a while, then judge again."""
        self.told, self.asked_until = False, step + ASK_AGAIN

    def _accept(self, step: Stepped) -> None:
        self.accepted.add(step.loss)
        self.hard = self.soft = self.outside = 0
        self.moved, self.told, self.told_data = 0.0, False, False
        self.rows = []
        if (norm := log_norm(step)) is not None:
            self.norms.add(norm)

    def _moved(self, step: Stepped) -> float:
        """Return how far the log gradient norm left its median, on either side: a model that blew up has tiny gradients, too.

        Where no norm is known nothing speaks for the data, and the loss alone decides.
        """
        norm = log_norm(step)
        return norm - self.norms.median if norm is not None and len(self.norms) >= FIRST else _ALL_THE_WAY
