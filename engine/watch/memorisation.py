"""Rows that teach nothing: known to the base already, or learnt by heart.

A perplexity under 3.0 under the base means that it would write most of the answer itself: boilerplate, or text it was trained on.
A training perplexity under 1.3, with held-out rows at twice that or not measured, is learning by heart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from qlora_tui.engine.events import Evaluated, Finding, Stepped
from qlora_tui.engine.watch.advice import BEST
from qlora_tui.engine.watch.rule import HeldRow, Rolling, Rule, grown, usable

WINDOW = 64
KNOWN_PERPLEXITY, KNOWN_SHARE, EXEMPT_TOKENS, FEWEST = 3.0, 0.2, 16, 10
HEART_PERPLEXITY, HELD_FACTOR = 1.3, 2.0


@dataclass
class Memorisation(Rule):
    """Looks at the base's losses once, then at training against held-out loss."""

    name: ClassVar[str] = "memorisation"
    rule: ClassVar[str] = (
        "base perplexity under 3.0 in a fifth of the held-out rows of 16 tokens and more; or the median training perplexity of 64 "
        "steps under 1.3 and the hold-out's over twice that, or not known"
    )
    losses: Rolling = field(default_factory=lambda: Rolling(WINDOW))
    held: float | None = None
    told: bool = False

    def see(self, step: Stepped) -> Finding | None:
        """Judge the training loss against the newest measurement."""
        if not usable(step):
            return None
        self.losses.add(step.loss)
        if self.told or not self.losses.full or step.epoch <= 1.0:
            return None
        train = grown(self.losses.median)
        held = grown(self.held) if self.held is not None else None
        if train >= HEART_PERPLEXITY or (held is not None and held <= HELD_FACTOR * train):
            return None
        self.told = True
        against = f"that of held-out rows {held:.2f}" if held is not None else "and no rows are held out"
        message = f"training perplexity is {train:.2f}, {against}: the rows are learnt by heart"
        return self.found("stop", step.step, message, BEST, {"train_perplexity": train, "held_perplexity": held})

    def measured(self, found: Evaluated, rows: Sequence[HeldRow]) -> Finding | None:
        """At step 0 count the rows that the base knows already; later remember how held-out rows fare."""
        if found.step:
            self.held = found.loss
            return None
        long = [row for row in rows if row.tokens >= EXEMPT_TOKENS]
        known = sum(grown(row.loss) < KNOWN_PERPLEXITY for row in long)
        if len(long) < FEWEST or known <= KNOWN_SHARE * len(long):
            return None
        under = f"perplexity under {KNOWN_PERPLEXITY:g}"
        message = f"the base knows {known} of {len(long)} held-out answers already ({under}): little is left to learn"
        advice = ("leave such rows out: perplexity_filter=3", "look for text that repeats: qlora-tui data FILE", "other rows")
        return self.found("info", 0, message, advice, {"known_rows": known, "held_rows": len(long), "share": known / len(long)})
