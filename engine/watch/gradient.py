"""A gradient norm far outside what it was, or clipped most of the time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from qlora_tui.engine.events import Finding, Stepped
from qlora_tui.engine.watch.advice import calmer
from qlora_tui.engine.watch.rule import Rolling, Rule, grown, log_norm, usable

WINDOW, ENOUGH = 64, 20
DEVIATIONS, FACTOR = 8.0, math.log(4.0)
TIMES, WITHIN = 3, 16
CLIPPED, CLIP_WINDOW = 0.5, 100
GIVE_UP = 48


@dataclass
class Gradient(Rule):
    """Looks at the logarithm of the norm before clipping: norms are spread over factors, not sums."""

    name: ClassVar[str] = "gradient"
    rule: ClassVar[str] = (
        "log gradient norm over its median of 64 steps by max(8 deviations, log 4), three times in 16 steps; "
        "told once: more than half of the last 100 steps were clipped"
    )
    norms: Rolling = field(default_factory=lambda: Rolling(WINDOW))
    high: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    outside: int = 0
    told: bool = False
    clipped: Rolling = field(default_factory=lambda: Rolling(CLIP_WINDOW))
    told_clipped: bool = False

    def see(self, step: Stepped) -> Finding | None:
        """Judge one norm against the norms before it; high ones never enter the baseline."""
        norm = log_norm(step)
        if norm is None or not usable(step):
            return None
        self.clipped.add(float(step.clipped))
        if len(self.norms) < ENOUGH or step.step <= self.setting.warmup_steps:
            self.norms.add(norm)
            return None
        middle, sigma = self.norms.median, self.norms.sigma
        if norm - middle <= max(DEVIATIONS * sigma, FACTOR):
            self.norms.add(norm)
            self.outside = 0
            self.told = self.told and bool(self.high) and step.step - self.high[-1] <= WINDOW
            return self._clipping(step)
        self.outside += 1
        self.high = [past for past in self.high if past > step.step - WITHIN] + [step.step]
        self.rows = ([*self.rows, *step.rows] if len(self.high) > 1 else list(step.rows))[:64]
        if self.outside >= GIVE_UP:
            self.norms.clear()
        if len(self.high) < TIMES or self.told:
            return None
        self.told = True
        numbers = {"grad_norm": step.grad_norm, "median": grown(middle), "sigma_log": sigma, "rows": list(self.rows)}
        message = f"gradient norm {step.grad_norm:.3g}, {grown(norm - middle):.0f} times its median of {len(self.norms)} steps"
        return self.found("stop", step.step, f"{message}, {len(self.high)} times in {WITHIN} steps", calmer(step.lr), numbers)

    def _clipping(self, step: Stepped) -> Finding | None:
        share = sum(self.clipped.values) / CLIP_WINDOW
        if self.told_clipped or not self.clipped.full or share <= CLIPPED:
            return None
        self.told_clipped = True
        message = (
            f"{share:.0%} of the last {CLIP_WINDOW} steps were clipped: the length of a step is set by max_grad_norm, not by the gradient"
        )
        numbers = {"share": share, "median": grown(self.norms.median)}
        return self.found("info", step.step, message, ("usual for small adapters; a lower learning rate if the loss is rough",), numbers)
