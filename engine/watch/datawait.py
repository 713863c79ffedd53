"""A device that waits for its batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from qlora_tui.engine.events import Finding, Stepped
from qlora_tui.engine.watch.rule import Rolling, Rule

WINDOW, SHARE = 32, 0.2


@dataclass
class DataWait(Rule):
    """Judges the share of a step that went into making batches."""

    name: ClassVar[str] = "data_wait"
    rule: ClassVar[str] = f"median share of a step spent on batches over {SHARE:.0%}, of {WINDOW} steps"
    kept: ClassVar[bool] = False
    shares: Rolling = field(default_factory=lambda: Rolling(WINDOW))
    told: bool = False

    def see(self, step: Stepped) -> Finding | None:
        """Judge the last steps; said once until it is over."""
        if step.seconds <= 0:
            return None
        self.shares.add(step.data_seconds / step.seconds)
        share = self.shares.median
        self.told = self.told and share > SHARE / 2
        if self.told or not self.shares.full or share <= SHARE:
            return None
        self.told = True
        message = f"{share:.0%} of each step is spent on making batches: the device waits"
        advice = ("look at the disk: tokens are read from it step by step", "close other programs on this machine", "more rows a step")
        return self.found("stop", step.step, message, advice, {"share": share, "steps": WINDOW})
