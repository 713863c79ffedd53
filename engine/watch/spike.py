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
from qlora_tui.engine.watch.advice import DATA, calmer
from qlora_tui.engine.watch.rule import Rolling, Rule, log_norm, usable

WINDOW, FIRST, ENOUGH = 64, 5, 20
HARD_NATS, SOFT_NATS = 2.0, 0.5
DEVIATIONS, SINGLE_DEVIATIONS = 6.0, 10.0
SMALL_BATCH = 4
GIVE_UP = 48
"""So many high steps in a row are the new baseline: whatever happened was told."""
QUIET = 50
"""Single hard steps are told at most once in so many."""
NORM_DEVIATIONS, NORM_FACTOR = 4.0, math.log(2.0)


@dataclass
class Spike(Rule):
    """Acts on a jump that stays; tells single hard steps with their rows, and changes of the data as such."""

    name: ClassVar[str] = "spike"
    rule: ClassVar[str] = (
        "loss over the median of 64 accepted steps by max(2.0, 6 deviations) twice in a row, or by max(0.5, 6 deviations) three "
        "times (one time more below four rows a step), and the gradient norm left its band in half of them"
    )
    accepted: Rolling = field(default_factory=lambda: Rolling(WINDOW))
    norms: Rolling = field(default_factory=lambda: Rolling(WINDOW))
    hard: int = 0
    soft: int = 0
    outside: int = 0
    moved: int = 0
    told: bool = False
    told_data: bool = False
    rows: list[int] = field(default_factory=list)
    quiet_until: int = 0

    def see(self, step: Stepped) -> Finding | None:
        """Judge one step against the steps before it; steps that spike never enter the baseline."""
        if not usable(step):
            return None
        if len(self.accepted) < FIRST:
            self._accept(step)
            return None
        middle, sigma = self.accepted.median, self.accepted.sigma
        rise = step.loss - middle
        hard = rise > max(HARD_NATS, DEVIATIONS * sigma)
        settled = len(self.accepted) >= ENOUGH and step.step > self.setting.warmup_steps
        if not hard and not (settled and rise > max(SOFT_NATS, DEVIATIONS * sigma)):
            self._accept(step)
            return None
        self.hard, self.soft, self.outside = (self.hard + 1 if hard else 0), self.soft + 1, self.outside + 1
        self.moved += self._moved(step)
        self.rows = [*self.rows, *step.rows][:64]
        numbers = {"loss": step.loss, "baseline": middle, "sigma": sigma, "limit": max(HARD_NATS, DEVIATIONS * sigma)}
        found = self._judge(step, rise, numbers | {"grad_norm": step.grad_norm, "in_a_row": self.soft, "rows": list(self.rows)}, hard=hard)
        if self.outside >= GIVE_UP:
            self.accepted.clear()
            self._accept(step)
        return found

    def _judge(self, step: Stepped, rise: float, numbers: dict[str, object], *, hard: bool) -> Finding | None:
        careful = self.setting.rows_per_step < SMALL_BATCH
        lasting = self.hard >= 2 + careful or self.soft >= 3 + careful
        over = f"loss {step.loss:.2f} is {rise:.1f} nats above its median of {len(self.accepted)} steps"
        moved = 2 * self.moved >= self.outside
        if lasting and moved and not self.told:
            self.told = True
            return self.found("stop", step.step, f"{over}, {self.soft} steps in a row", calmer(step.lr), numbers)
        if lasting and not moved and not self.told_data:
            self.told_data = True
            message = f"{over}, {self.soft} steps in a row, and the gradient norm did not move: the rows changed, not the model"
            return self.found("info", step.step, message, DATA, numbers)
        if hard and rise > SINGLE_DEVIATIONS * self.accepted.sigma and self.hard == 1 and not lasting and step.step >= self.quiet_until:
            self.quiet_until = step.step + QUIET
            return self.found("info", step.step, f"{over}, once", ("look at the rows of this step",), numbers)
        return None

    def _accept(self, step: Stepped) -> None:
        self.accepted.add(step.loss)
        self.hard = self.soft = self.outside = 0
        self.moved, self.told, self.told_data = 0, False, False
        self.rows = []
        if (norm := log_norm(step)) is not None:
            self.norms.add(norm)

    def _moved(self, step: Stepped) -> bool:
        """Say whether the gradient norm left its band, on either side: a model that blew up has tiny gradients, too."""
        norm = log_norm(step)
        if norm is None or len(self.norms) < FIRST:
            return True
        return abs(norm - self.norms.median) > max(NORM_DEVIATIONS * self.norms.sigma, NORM_FACTOR)
