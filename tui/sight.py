"""Which part of the curve is looked at, and how: zoom, crosshair, smoothing, what the x axis counts. Arithmetic only."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qlora_tui.tui.history import USUAL, WEIGHTS, Bucket, at_step

Counts = Literal["step", "tokens", "time"]
COUNTS: tuple[Counts, ...] = ("step", "tokens", "time")
CLOSEST = 20
"""The fewest steps that fill the plot; also how far it reaches before there are as many, so that the first points do not jump."""


@dataclass(frozen=True, slots=True)
class Sight:
    """How a person looks at the loss; steps count as they do in the run.

    `span` steps are shown, all where it is 0: from `left` on while there is a crosshair, else the newest ones.
    """

    counts: Counts = "step"
    weight: int = USUAL
    everything: bool = False
    cross: int | None = None
    span: int = 0
    left: int = 0

    @property
    def smoothing(self) -> float:
        """Return the weight of the smoothed line."""
        return WEIGHTS[self.weight]

    def edges(self, first: int, last: int, horizon: int) -> tuple[int, int]:
        """Return the first and last step of the plot, where the run has steps `first` to `last` and may reach `horizon`."""
        if not self.span:
            return first, max(horizon, last, first + CLOSEST)
        if self.cross is not None:
            return self.left, self.left + self.span
        right = max(last, first + self.span)
        return right - self.span, right

    def next_counts(self) -> Sight:
        """Return it with the next thing for the x axis to count."""
        return replace(self, counts=COUNTS[(COUNTS.index(self.counts) + 1) % len(COUNTS)])

    def next_weight(self) -> Sight:
        """Return it with the next smoothing."""
        return replace(self, weight=(self.weight + 1) % len(WEIGHTS))

    def moved(self, by: int, buckets: Sequence[Bucket], ends: tuple[int, int], columns: int) -> Sight:
        """Return it with the crosshair `by` columns further, at least to the next bucket; the first move puts it on the newest step.

        Args:
            by: columns; below zero is to the left.
            buckets: what is drawn, oldest first; not empty.
            ends: the plot's first and last step.
            columns: how many cells wide it is.
        """
        if self.cross is None:
            return self._held(buckets[-1].last, ends)
        here = max(0, at_step(tuple(buckets), self.cross))
        wanted = self.cross + by * max(1.0, (ends[1] - ends[0]) / max(1, columns))
        there = max(0, at_step(tuple(buckets), int(wanted)))
        if there == here:
            there = here + (1 if by > 0 else -1)
        return self._held(buckets[min(max(there, 0), len(buckets) - 1)].last, ends)

    def zoomed(self, factor: float, first: int, last: int, horizon: int) -> Sight:
        """Return it with `factor` times as many steps in sight, around the crosshair if there is one."""
        left, right = self.edges(first, last, horizon)
        whole = max(last, first + CLOSEST) - first
        span = int(min(max(CLOSEST, min(right - left, whole) * factor), whole + 1))
        if span > whole:
            return replace(self, span=0, left=0)
        if self.cross is None:
            return replace(self, span=span)
        share = (self.cross - left) / max(1, right - left)
        start = min(max(first, round(self.cross - share * span)), max(first, first + whole - span))
        return replace(self, span=span, left=start)._held(self.cross, (start, start + span))

    def without_cross(self) -> Sight:
        """Return it without the crosshair."""
        return replace(self, cross=None)

    def whole(self) -> Sight:
        """Return it with all steps in sight."""
        return replace(self, span=0, left=0)

    def _held(self, cross: int, ends: tuple[int, int]) -> Sight:
        """Return it with the crosshair at a step, and the plot moved along where it would leave it."""
        left, right = ends
        if self.span and cross < left:
            left = cross
        elif self.span and cross > right:
            left += cross - right
        return replace(self, cross=cross, left=left if self.span else 0)


class Scale:
    """Steps on the x axis as what it counts; tokens and seconds are known where a bucket ends, and taken as even in between."""

    def __init__(self, counts: Counts, buckets: Sequence[Bucket]) -> None:
        """Count `counts`; `buckets` are what the history has, oldest first."""
        useful = bool(buckets) and (buckets[-1].tokens if counts == "tokens" else buckets[-1].seconds) > 0
        self.counts: Counts = counts if useful else "step"
        self._steps = [bucket.last for bucket in buckets]
        self._values = [float(bucket.tokens if counts == "tokens" else bucket.seconds) for bucket in buckets]

    def at(self, step: float) -> float:
        """Return where `step` lies; beyond what was trained it goes on as it did on average."""
        if self.counts == "step" or not self._steps:
            return float(step)
        index = bisect_left(self._steps, step)
        if index >= len(self._steps):
            end = self._steps[-1]
            return self._values[-1] + (step - end) * self._values[-1] / max(1, end)
        if not index:
            first = self._steps[0]
            return self._values[0] * max(0.0, step) / first if first > 0 else self._values[0]
        low, high = self._steps[index - 1], self._steps[index]
        share = (step - low) / (high - low)
        return self._values[index - 1] + share * (self._values[index] - self._values[index - 1])
