"""Steps that take three times as long a token as they used to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from qlora_tui.engine.events import Finding, Stepped
from qlora_tui.engine.watch.rule import Rolling, Rule

WINDOW, ENOUGH = 64, 20
FACTOR, LASTS = 3.0, 10
_ADVICE = (
    "close other programs on this device",
    "look at temperature and power on the screen: a hot card slows down",
    "if memory is nearly full: recompute more layers, or take fewer rows at once, next time",
)


@dataclass
class Throughput(Rule):
    """Judges seconds a token, so that long rows are no fault."""

    name: ClassVar[str] = "throughput"
    rule: ClassVar[str] = f"seconds a token over {FACTOR:g} times their median of {WINDOW} steps, {LASTS} steps in a row"
    kept: ClassVar[bool] = False
    usual: Rolling = field(default_factory=lambda: Rolling(WINDOW))
    slow: int = 0

    def see(self, step: Stepped) -> Finding | None:
        """Judge one step; slow ones never enter the median."""
        if step.seconds <= 0 or step.tokens <= 0:
            return None
        pace = step.seconds / step.tokens
        if len(self.usual) < ENOUGH or pace <= FACTOR * self.usual.median:
            self.usual.add(pace)
            self.slow = 0
            return None
        self.slow += 1
        if self.slow != LASTS:
            return None
        usual = self.usual.median
        message = f"{1 / pace:,.0f} tokens a second where {1 / usual:,.0f} were usual, for {LASTS} steps"
        return self.found("stop", step.step, message, _ADVICE, {"tokens_per_second": 1 / pace, "usual": 1 / usual, "steps": LASTS})
