"""What every detector is made of: what it knows of the run, a memory that JSON can hold, and windows of constant size."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

from qlora_tui.engine.events import Evaluated, Finding, Severity, Stepped

UNKNOWN = -1.0
"""A gradient norm that a foreign log does not tell."""
TO_SIGMA = 1.4826
"""Turns a median absolute deviation into a standard deviation for normal noise."""
MEDIAN_ERROR = 1.2533
"""Standard error of a median of normal noise over that of its mean, sqrt(pi / 2)."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What the detectors know of a run before its first step; 0 rows a step: unknown, and judged as carefully as one row."""

    total_steps: int = 0
    warmup_steps: int = 0
    rows_per_step: int = 0


class HeldRow(NamedTuple):
    """One held-out row of a measurement: nats a supervised token, and how many tokens those are."""

    loss: float
    tokens: int


class Rolling:
    """The last few numbers, with a median and a spread that single outliers do not move."""

    def __init__(self, size: int, values: Iterable[float] = ()) -> None:
        """Keep at most `size` numbers, the newest."""
        self._values: deque[float] = deque(values, maxlen=size)

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: float) -> None:
        """Take a number in; the oldest leaves when there is no room."""
        self._values.append(value)

    def clear(self) -> None:
        """Forget all."""
        self._values.clear()

    @property
    def full(self) -> bool:
        """Say whether the window holds as many numbers as it can."""
        return len(self._values) == self._values.maxlen

    @property
    def values(self) -> list[float]:
        """Return the numbers, oldest first."""
        return list(self._values)

    @property
    def median(self) -> float:
        """Return the middle of at least one number."""
        return statistics.median(self._values)

    @property
    def sigma(self) -> float:
        """Return the standard deviation that normal noise of this median absolute deviation would have."""
        middle = self.median
        return TO_SIGMA * statistics.median(abs(value - middle) for value in self._values)

    def falling(self, newest: int) -> tuple[float, float]:
        """Return median and deviation of a window that may be falling: of the newest part, and of what changes from number to number.

        Where nothing falls both are those of the whole window, but for noise.
        """
        values = self.values
        steps = [abs(late - early) for early, late in itertools.pairwise(values)]
        rough = TO_SIGMA * statistics.median(steps) / math.sqrt(2) if len(steps) > 1 else math.inf
        return min(self.median, statistics.median(values[-newest:])), min(self.sigma, rough)

    def again(self, values: Iterable[float]) -> Self:
        """Return a window of this size over `values`."""
        assert self._values.maxlen is not None
        return type(self)(self._values.maxlen, values)


@dataclass
class Rule:
    """One symptom. Its fields but `setting` are its memory: numbers, flags, lists of them and windows.

    A finding of severity "stop" says that the evidence is enough to act on; what is then done, the user chooses.
    """

    name: ClassVar[str]
    rule: ClassVar[str]
    """The rule in one line, as every finding shows it."""
    kept: ClassVar[bool] = True
    """Whether the memory goes into the checkpoint. Seconds do not: a resume may run elsewhere, and the rest must be equal to the bit."""
    setting: Setting

    def see(self, step: Stepped) -> Finding | None:
        """Look at one step in constant time; speak once an episode."""
        return None

    def measured(self, found: Evaluated, rows: Sequence[HeldRow]) -> Finding | None:
        """Look at one measurement of the hold-out; `rows` is empty where a log tells the mean alone."""
        return None

    def cleared(self, step: int) -> None:
        """Take in that held-out rows spoke against the finding of `step`: what it saw may still come to be an illness."""

    def state(self) -> dict[str, Any]:
        """Return what has to be remembered, as JSON can hold it."""
        kept = {name: vars(self)[name] for name in self._memory()}
        return {name: value.values if isinstance(value, Rolling) else value for name, value in kept.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned; what it does not name starts afresh."""
        for name in self._memory():
            if name in state:
                before, value = vars(self)[name], state[name]
                vars(self)[name] = before.again(value) if isinstance(before, Rolling) else value

    def found(self, severity: Severity, step: int, message: str, advice: Sequence[str], numbers: Mapping[str, Any]) -> Finding:
        """Return a finding that carries the rule beside its numbers."""
        return Finding(self.name, severity, step, message, tuple(advice), {"rule": self.rule, **numbers})

    def _memory(self) -> list[str]:
        return [item.name for item in dataclasses.fields(self) if item.name != "setting"] if self.kept else []


def usable(step: Stepped) -> bool:
    """Say whether a step was applied and has a finite loss."""
    return not step.skipped and math.isfinite(step.loss)


def grown(log: float) -> float:
    """Return exp of `log`, which no foreign number makes overflow.

    >>> grown(0.0), grown(1e9) > 1e300
    (1.0, True)
    """
    return math.exp(min(log, 700.0))


def log_norm(step: Stepped) -> float | None:
    """Return the logarithm of the gradient norm; None where it is unknown or zero."""
    return math.log(step.grad_norm) if math.isfinite(step.grad_norm) and step.grad_norm > 0 else None


def paired(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Return the mean of `after` minus `before` over the same rows, and its standard error (infinite below two rows)."""
    changes = [late - early for early, late in zip(before, after, strict=True)]
    if not all(map(math.isfinite, changes)):
        return math.inf, 0.0  # a loss that is no number is as bad as can be
    error = statistics.stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else math.inf
    return statistics.fmean(changes), error
