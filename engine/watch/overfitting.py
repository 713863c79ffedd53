"""Held-out rows that get worse while training rows get better, judged row by row.

Rows differ far more from each other than a model changes on one of them, so comparing the means of two measurements finds
nothing in a hold-out of usual size. The change of every row, from the best measurement to this one, does.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from qlora_tui.engine.events import Evaluated, Finding, Stepped
from qlora_tui.engine.watch.advice import BEST
from qlora_tui.engine.watch.rule import MEDIAN_ERROR, HeldRow, Rolling, Rule, paired, usable

WINDOW = 32
FEWEST = 20
ERRORS, NATS = 2.5, 0.01
IN_A_ROW = 2
FIRST = 8
"""So many first losses stand for training before it began."""
MEAN_ALONE, MEAN_IN_A_ROW = 0.02, 3
"""Where a log tells the mean alone: worse than the best by this share, so many times in a row."""


@dataclass
class Overfitting(Rule):
    """Compares each measurement with the best one; says so where nothing can be compared."""

    name: ClassVar[str] = "overfitting"
    rule: ClassVar[str] = (
        "held-out rows worse than at the best measurement by 0.01 nats and 2.5 paired standard errors, twice in a row, while the "
        "median training loss did not rise by two standard errors (by the mean alone: 2 % worse, three times in a row)"
    )
    losses: Rolling = field(default_factory=lambda: Rolling(WINDOW))
    best: float | None = None
    best_rows: list[float] = field(default_factory=list)
    best_step: int = 0
    best_train: float | None = None
    start: list[float] = field(default_factory=list)
    worse: int = 0
    told: bool = False
    told_unable: bool = False

    def see(self, step: Stepped) -> Finding | None:
        """Follow the training loss; once in the second epoch, say where too few rows are held out to judge, or none."""
        if usable(step):
            self.losses.add(step.loss)
            if len(self.start) < FIRST:
                self.start = [*self.start, step.loss]
        rows = len(self.best_rows)
        if step.epoch <= 1.0 or rows >= FEWEST or self.told_unable or (self.best is not None and not rows):
            return None
        self.told_unable = True
        what = f"{rows} held-out rows are too few to tell overfitting from chance" if rows else "no held-out rows"
        message = f"{what}: nobody can tell whether a second pass still teaches or only memorises"
        return self.found(
            "info", step.step, message, (f"hold out at least {FEWEST} rows next time: val_set_size=0.1",), {"held_rows": rows}
        )

    def measured(self, found: Evaluated, rows: Sequence[HeldRow]) -> Finding | None:
        """Compare row by row with the best measurement; the base, measured before step 1, is the first of them."""
        if not math.isfinite(found.loss):
            return None
        losses = [row.loss for row in rows]
        train = self.losses.median if len(self.losses) else None
        if self.best is None or found.loss < self.best:
            self.best, self.best_rows, self.best_step, self.best_train = found.loss, losses, found.step, train
            self.worse, self.told = 0, False
            return None
        then = self.best_train if self.best_train is not None else statistics.median(self.start) if self.start else None
        fell = train is not None and then is not None and train < then + 2 * MEDIAN_ERROR * self.losses.sigma / WINDOW**0.5
        by_row = len(losses) >= FEWEST and len(losses) == len(self.best_rows)
        rise, error = paired(self.best_rows, losses) if by_row else (found.loss - self.best, MEAN_ALONE * abs(self.best) / ERRORS)
        unable = bool(losses) and not by_row
        self.worse = self.worse + 1 if fell and not unable and rise > max(ERRORS * error, NATS) else 0
        if self.told or self.worse < (IN_A_ROW if by_row else MEAN_IN_A_ROW):
            return None
        self.told = True
        numbers = {
            "rise": rise,
            "stderr": error if by_row else None,
            "best_step": self.best_step,
            "best": self.best,
            "held_rows": len(losses),
        }
        message = f"held-out rows are {rise:.2f} nats worse than at step {self.best_step}, and training rows are still getting better"
        return self.found("stop", found.step, message, BEST, numbers)
