"""The steps of a run in bounded memory: buckets that halve their number when full.

Persistent values: `add` and `cut` return a new history and share what did not change, so a checkpoint can keep
the history of its step for nothing and a resume can go back to it exactly. Full resolution stays on disk.
Named tuples, since a file of a million steps makes as many of them: they are built three times as fast as a dataclass.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import NamedTuple

LIMIT = 2048
WEIGHTS = (0.0, 0.6, 0.9, 0.99)
"""The smoothings one can choose from; 0 is the loss as it came."""
USUAL = 2
Smooth = tuple[float, float, float, float]
_UNKNOWN: Smooth = (math.nan,) * 4
_ZERO: Smooth = (0.0,) * 4


class Bucket(NamedTuple):
    """Some neighbouring steps: the range of their loss and how many were not finite; the rest is as of the last of them.

    `smooth` holds one smoothed loss for each of `WEIGHTS`; `tokens` were trained and `seconds` had passed since the
    run began, with the time between two attempts left out.
    """

    first: int
    last: int
    low: float
    high: float
    smooth: Smooth
    steps: int = 1
    bad: int = 0
    rate: float = 0.0
    grad: float = math.nan
    tokens: int = 0
    seconds: float = 0.0


class History(NamedTuple):
    """Every step so far, in at most `LIMIT` buckets of `stride` steps, and the running smoothed losses."""

    sealed: tuple[Bucket, ...] = ()
    filling: Bucket | None = None
    stride: int = 1
    sums: Smooth = _ZERO
    parts: Smooth = _ZERO
    bad: int = 0
    tokens: int = 0

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Return all buckets, oldest first, the unfinished one included."""
        return self.sealed if self.filling is None else (*self.sealed, self.filling)

    @property
    def smooth(self) -> float | None:
        """Return the loss at the usual smoothing, corrected for its start at zero, or None before the first finite loss."""
        return self.sums[USUAL] / self.parts[USUAL] if self.parts[USUAL] else None

    def add(self, step: int, loss: float, rate: float = 0.0, grad: float = math.nan, tokens: int = 0, seconds: float = 0.0) -> History:
        """Return the history with one more step; a non-finite loss is counted and marked, never averaged."""
        sums, parts, bad = self.sums, self.parts, self.bad
        finite = math.isfinite(loss)
        if finite:
            _, a, b, c = sums
            sums = (loss, 0.6 * a + 0.4 * loss, 0.9 * b + 0.1 * loss, 0.99 * c + 0.01 * loss)
            _, a, b, c = parts
            parts = (1.0, 0.6 * a + 0.4, 0.9 * b + 0.1, 0.99 * c + 0.01)
        else:
            bad += 1
        smooth = (sums[0], sums[1] / parts[1], sums[2] / parts[2], sums[3] / parts[3]) if parts[0] else _UNKNOWN
        total, old = self.tokens + tokens, self.filling
        low, high = (loss, loss) if finite else (math.inf, -math.inf)
        if old is None:
            bucket = Bucket(step, step, low, high, smooth, 1, int(not finite), rate, grad, total, seconds)
        else:
            low, high = min(old.low, low), max(old.high, high)
            bucket = Bucket(old.first, step, low, high, smooth, old.steps + 1, old.bad + (not finite), rate, grad, total, seconds)
        if bucket.steps < self.stride:
            return History(self.sealed, bucket, self.stride, sums, parts, bad, total)
        sealed, stride = (*self.sealed, bucket), self.stride
        if len(sealed) >= LIMIT:
            sealed, stride = _halved(sealed), stride * 2
        return History(sealed, None, stride, sums, parts, bad, total)

    def cut(self, step: int) -> History:
        """Return the history without what came after `step`; a bucket that straddles it goes too."""
        kept = tuple(bucket for bucket in self.buckets if bucket.last <= step)
        if not kept:
            return History()
        return started_from(kept[-1])._replace(sealed=kept, stride=self.stride, bad=sum(bucket.bad for bucket in kept))

    def joined(self, later: History) -> History:
        """Return these steps and, behind them, those of `later` that come after: two ends of a file read from both."""
        reached = self.buckets[-1].last if self.buckets else 0
        kept = tuple(bucket for bucket in later.buckets if bucket.first > reached)
        return later._replace(sealed=(*self.buckets, *kept), filling=None)


def started_from(end: Bucket) -> History:
    """Return an empty history whose smoothing and counts go on where `end` stands."""
    known = math.isfinite(end.smooth[0])
    return History(sums=end.smooth if known else _ZERO, parts=(1.0,) * 4 if known else _ZERO, tokens=end.tokens)


def at_step(buckets: tuple[Bucket, ...], step: int) -> int:
    """Return the index of the bucket that holds `step`, or of the nearest one before it; -1 where there is none."""
    return bisect_right(buckets, step, key=lambda bucket: bucket.first) - 1


def _halved(buckets: tuple[Bucket, ...]) -> tuple[Bucket, ...]:
    pairs = zip(buckets[::2], buckets[1::2], strict=False)
    merged = [_merged(left, right) for left, right in pairs]
    return (*merged, buckets[-1]) if len(buckets) % 2 else tuple(merged)


def _merged(left: Bucket, right: Bucket) -> Bucket:
    low, high = min(left.low, right.low), max(left.high, right.high)
    return right._replace(first=left.first, low=low, high=high, steps=left.steps + right.steps, bad=left.bad + right.bad)
