"""A loss that creeps up for many steps, or held-out rows that became worse than under the base.

Medians of 32 steps are compared with the best such median, so no single row counts. A run can be ill from its first step on:
then there is no good window to compare with, and the base itself, measured before step 1, takes its place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from qlora_tui.engine.events import Evaluated, Finding, Stepped
from qlora_tui.engine.watch.advice import CALM, DATA, calmer
from qlora_tui.engine.watch.rule import MEDIAN_ERROR, HeldRow, Rolling, Rule, grown, log_norm, paired, usable

WINDOW = 32
RISE, DEVIATIONS = 0.3, 6.0
BASE_RISE, BASE_ERRORS = 0.3, 4.0
NORM_FACTOR, NORM_ERRORS = math.log(1.3), 4.0
GIVE_UP = 96
ASK_AGAIN = 20
FIRST, EARLY_SHARE = 8, 0.75
"""The first losses are the base's, since an adapter begins as no change: until there is a better one, theirs is the best median.
So few say little of their own spread, so it counts for less than that of a whole window."""


@dataclass
class Drift(Rule):
    """Compares the median of the last steps with the best one so far, and held-out rows with the base."""

    name: ClassVar[str] = "drift"
    rule: ClassVar[str] = (
        "median of 32 losses over the best such median by max(0.3, 6 standard errors) while the gradient norm left "
        "its median by a factor 1.3 and 4 standard errors; or held-out rows worse than under the base by 0.3 nats and 4 paired "
        "standard errors"
    )
    losses: Rolling = field(default_factory=lambda: Rolling(WINDOW))
    norms: Rolling = field(default_factory=lambda: Rolling(WINDOW))
    begun: bool = False
    best: float | None = None
    best_error: float = 0.0
    best_norm: float | None = None
    best_norm_error: float = 0.0
    base: list[float] = field(default_factory=list)
    base_told: bool = False
    outside: int = 0
    told: bool = False
    told_data: bool = False
    rate: float = 0.0
    asked_until: int = 0

    def see(self, step: Stepped) -> Finding | None:
        """Judge the last 32 steps."""
        if not usable(step):
            return None
        self.rate = max(self.rate, step.lr)
        self.losses.add(step.loss)
        if (norm := log_norm(step)) is not None:
            self.norms.add(norm)
        if len(self.losses) == FIRST and self.best is None and not self.begun:
            self.begun = True
            self.best, self.best_norm = self.losses.median, self.norms.median if len(self.norms) == FIRST else None
            self.best_error = EARLY_SHARE * MEDIAN_ERROR * self.losses.sigma / math.sqrt(FIRST)
            self.best_norm_error = MEDIAN_ERROR * self.norms.sigma / math.sqrt(FIRST) if len(self.norms) else 0.0
        if not self.losses.full:
            return None
        middle, error = self.losses.median, MEDIAN_ERROR * self.losses.sigma / math.sqrt(WINDOW)
        if self.best is None or middle < self.best:
            self.best, self.best_error, self.best_norm = middle, error, self.norms.median if self.norms.full else None
            self.best_norm_error = self._norm_error()
        limit = max(RISE, DEVIATIONS * max(error, self.best_error))
        if middle <= self.best + limit:
            over = middle > self.best + limit / 2  # an episode ends well inside the limit, not at its edge
            self.outside, self.told, self.told_data = 0, self.told and over, self.told_data and over
            return None
        self.outside += 1
        found = self._judge(step, middle, self.best, limit)
        if self.outside >= GIVE_UP:
            self.best = None
        return found

    def _judge(self, step: Stepped, middle: float, best: float, limit: float) -> Finding | None:
        moved = True
        if self.best_norm is not None and self.norms.full:
            errors = math.hypot(self.best_norm_error, self._norm_error())
            moved = abs(self.norms.median - self.best_norm) > max(NORM_FACTOR, NORM_ERRORS * errors)
        norm = grown(self.norms.median) if self.norms.full else None
        was = grown(self.best_norm) if self.best_norm is not None else None
        numbers = {"median": middle, "best": best, "limit": limit, "grad_norm": norm, "grad_norm_then": was}
        over = f"the median loss of {WINDOW} steps is {middle:.2f}, {middle - best:.2f} above its best"
        if moved and not self.told and step.step >= self.asked_until:
            self.told = True
            return self.found("stop", step.step, over, calmer(self.rate), numbers)
        if not moved and not self.told_data:
            self.told_data = True
            return self.found("info", step.step, f"{over}, {CALM}", DATA, numbers | {"calm": True, "learning_rate": self.rate})
        return None

    def cleared(self, step: int) -> None:
        """Be quiet for a while, then judge again."""
        self.told, self.asked_until = False, step + ASK_AGAIN

    def _norm_error(self) -> float:
        return MEDIAN_ERROR * self.norms.sigma / math.sqrt(WINDOW) if len(self.norms) else 0.0

    def measured(self, found: Evaluated, rows: Sequence[HeldRow]) -> Finding | None:
        """Compare held-out rows with the base, row by row."""
        losses = [row.loss for row in rows]
        if found.step == 0:
            self.base = losses
            return None
        if len(losses) < 2 or len(losses) != len(self.base) or self.base_told:
            return None
        rise, error = paired(self.base, losses)
        if not rise > max(BASE_RISE, BASE_ERRORS * error):
            return None
        self.base_told = True
        message = f"held-out rows are {rise:.2f} nats worse than under the base: this adapter does harm"
        return self.found("stop", found.step, message, calmer(self.rate), {"rise": rise, "stderr": error, "held_rows": len(losses)})
