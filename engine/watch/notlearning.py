"""Training that moves nothing, or only the training rows: noise that repeats every epoch is not learning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from qlora_tui.engine.events import Evaluated, Finding, Stepped
from qlora_tui.engine.watch.advice import LEARN
from qlora_tui.engine.watch.rule import MEDIAN_ERROR, HeldRow, Rolling, Rule, paired, usable

WINDOW, FLAT_STEPS = 64, 300
STILL = 3
HELD_ERRORS, SURE_ERRORS, FLAT_ERRORS = 2.0, 3.0, 3.0
FALL = 0.3
IN_A_ROW, FLAT_IN_A_ROW = 2, 64


@dataclass
class NotLearning(Rule):
    """Looks for gradients of zero, for a loss as high as at the start, and for held-out rows that gain nothing."""

    name: ClassVar[str] = "not_learning"
    rule: ClassVar[str] = (
        "an adapter matrix B all zero, or a gradient of zero, after two steps; after 300 steps, the median loss of 64 steps not below "
        "the first 64 by a standard error (three, where held-out rows agree), 64 times in a row; or after an epoch, training loss down "
        "by 0.3 nats and held-out rows no better than under the base, twice in a row"
    )
    first: Rolling = field(default_factory=lambda: Rolling(WINDOW))
    last: Rolling = field(default_factory=lambda: Rolling(WINDOW))
    seen: int = 0
    still: int = 0
    base: list[float] = field(default_factory=list)
    held_better: bool = False
    in_vain: int = 0
    flat: int = 0
    epoch: float = 0.0
    told: list[str] = field(default_factory=list)

    def see(self, step: Stepped) -> Finding | None:
        """Judge the loss against that of the first steps."""
        if not usable(step):
            return None
        self.seen, self.epoch = self.seen + 1, step.epoch
        (self.last if self.first.full else self.first).add(step.loss)
        self.still = self.still + 1 if step.grad_norm == 0 and step.lr > 0 else 0
        if self.still == STILL:
            return self._once("zero", step.step, f"the gradient was zero {STILL} times in a row: nothing is learnt", {"steps": STILL})
        if self.seen < WINDOW + FLAT_STEPS or self.held_better or step.lr <= 0:
            return None
        fall, error = self.first.median - self.last.median, MEDIAN_ERROR * self.first.sigma * (2 / WINDOW) ** 0.5
        self.flat = self.flat + 1 if fall < error * (FLAT_ERRORS if self.base else 1.0) else 0
        if self.flat < FLAT_IN_A_ROW:
            return None
        message = f"the loss is where it was at the start: {self.first.median:.2f} then, {self.last.median:.2f} now"
        return self._once("flat", step.step, message, {"fall": fall, "stderr": error, "steps": self.seen})

    def measured(self, found: Evaluated, rows: Sequence[HeldRow]) -> Finding | None:
        """Compare held-out rows with the base once training has seen every row."""
        losses = [row.loss for row in rows]
        if found.step == 0:
            self.base = losses
            return None
        if len(losses) < 2 or len(losses) != len(self.base):
            return None
        change, error = paired(self.base, losses)
        better = sum(now < then for then, now in zip(self.base, losses, strict=True)) / len(losses)
        gained = max(-change / error if error else 0.0, (2 * better - 1) * len(losses) ** 0.5)  # by size, or by a sign test
        self.held_better = self.held_better or gained > SURE_ERRORS
        fall = self.first.median - self.last.median if len(self.last) >= WINDOW // 2 else 0.0
        vain = self.epoch > 1.0 and fall > FALL and gained <= HELD_ERRORS
        self.in_vain = self.in_vain + 1 if vain else 0
        if self.in_vain < IN_A_ROW:
            return None
        message = f"training loss fell by {fall:.2f} and held-out rows are no better than under the base: noise that repeats every epoch"
        return self._once("vain", found.step, message, {"fall": fall, "held_gain": -change, "stderr": error, "held_rows": len(losses)})

    def adapter(self, step: int, zero: Sequence[str], total: int) -> Finding | None:
        """Say which of `total` B matrices are still all zero after a few steps with a rate above zero."""
        if not zero:
            return None
        message = f"{len(zero)} of {total} adapter layers have not moved: their B is still zero"
        return self._once("zero", step, message, {"zero": len(zero), "of": total, "layers": list(zero[:4])})

    def _once(self, what: str, step: int, message: str, numbers: dict[str, object]) -> Finding | None:
        if what in self.told:
            return None
        self.told = [*self.told, what]
        return self.found("stop", step, message, LEARN, numbers)
