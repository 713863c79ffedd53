"""Changes of the learning rate beside its schedule: made by people while a run goes, or written down for the same run again.

`121:0.5` means that from step 121 on the learning rate is half of what it was. Factors are multiplied, and how they are
written gives the very number back, so a run that is told of the changes of another goes the same way, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

LOWEST, HIGHEST = 0.01, 100.0
"""What a person may make of the planned learning rate, in all: beyond it another run is wanted, not this one."""


PLANNED = "config"
"""How the id of a change begins that the config names."""


@dataclass(frozen=True, slots=True)
class Change:
    """From `step` on the learning rate is `factor` times what it was; `id` is the wish that asked for it, or its place in the config."""

    step: int
    factor: float
    id: str

    @property
    def text(self) -> str:
        """Return it as the config writes it.

        >>> Change(121, 0.5, "").text
        '121:0.5'
        """
        return f"{self.step}:{self.factor!r}"


def read(text: str, id: str = "") -> Change:
    """Return what `121:0.5` means.

    Raises:
        ValueError: it is no step and factor, or one that no run could have.
    """
    step, _, factor = text.partition(":")
    try:
        found = Change(int(step), float(factor), id)
    except ValueError:
        raise ValueError(text) from None
    if found.step < 1 or not LOWEST <= found.factor <= HIGHEST:
        raise ValueError(text)
    return found


def planned(texts: Iterable[str]) -> list[Change]:
    """Return the changes that a config names; each is known by its place.

    Raises:
        ValueError: one of them is none.
    """
    return [read(text, f"{PLANNED} {number}") for number, text in enumerate(texts)]


@dataclass(slots=True)
class Rates:
    """What the schedule's learning rate is taken times, and how it came to that.

    `coming` are changes that wait for their step, `done` the ids of those that count already: a roll back does not make
    them count again.
    """

    coming: list[Change] = field(default_factory=list)
    factor: float = 1.0
    done: list[str] = field(default_factory=list)

    def due(self, step: int) -> list[Change]:
        """Return the changes that count from `step` on and do not count yet."""
        return [change for change in self.coming if change.step <= step and change.id not in self.done]

    def fault(self, factor: float) -> str:
        """Say why the rate cannot be multiplied by `factor`, or nothing."""
        if not math.isfinite(factor) or factor <= 0:
            return f"{factor:g} is no factor"
        if not LOWEST <= self.factor * factor <= HIGHEST:
            return f"it would be {self.factor * factor:g} times the planned one; {LOWEST:g} to {HIGHEST:g} is possible"
        return ""

    def change(self, change: Change) -> None:
        """Let `change` count from now on."""
        self.factor *= change.factor
        self.done.append(change.id)

    def halve(self) -> None:
        """Go on with half the rate, as every roll back does; it is no change of a person and has no bounds."""
        self.factor /= 2

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint has to remember."""
        return {"rate_factor": self.factor, "rates_done": list(self.done)}

    def restore(self, state: Any) -> None:
        """Go on from what a checkpoint remembers; one of an older version knows of no changes."""
        self.factor = float(state.get("rate_factor", 1.0))
        self.done = [str(one) for one in state.get("rates_done", ())]
