"""The loss of a run in bounded memory: buckets that halve their number when full.

Persistent values: `add` and `cut` return a new history and share what did not change, so a checkpoint can keep
the history of its step for nothing and a resume can go back to it exactly. Full resolution stays on disk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

LIMIT = 2048
SMOOTHING = 0.9


@dataclass(frozen=True, slots=True)
class Bucket:
    """Some neighbouring steps: their range, their smoothed loss at the end, and how many were not finite."""

    first: int
    last: int
    low: float
    high: float
    smooth: float
    count: int
    bad: int


@dataclass(frozen=True, slots=True)
class History:
    """Every step so far, in at most `LIMIT` buckets of `stride` steps, and the running smoothed loss."""

    sealed: tuple[Bucket, ...] = ()
    filling: Bucket | None = None
    stride: int = 1
    smooth_sum: float = 0.0
    smooth_weight: float = 0.0
    bad: int = 0

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Return all buckets, oldest first, the unfinished one included."""
        return self.sealed if self.filling is None else (*self.sealed, self.filling)

    @property
    def smooth(self) -> float | None:
        """Return the smoothed loss, corrected for its start at zero, or None before the first finite loss."""
        return self.smooth_sum / self.smooth_weight if self.smooth_weight else None

    def add(self, step: int, loss: float) -> History:
        """Return the history with one more step; a non-finite loss is counted and marked, never averaged."""
        total, weight, finite = self.smooth_sum, self.smooth_weight, math.isfinite(loss)
        if finite:
            total = SMOOTHING * total + (1 - SMOOTHING) * loss
            weight = SMOOTHING * weight + (1 - SMOOTHING)
        smooth = total / weight if weight else math.nan
        bucket = _grown(self.filling, step, loss, smooth)
        bad = self.bad + (not finite)
        if bucket.count < self.stride:
            return History(self.sealed, bucket, self.stride, total, weight, bad)
        sealed, stride = (*self.sealed, bucket), self.stride
        if len(sealed) >= LIMIT:
            sealed, stride = _halved(sealed), stride * 2
        return History(sealed, None, stride, total, weight, bad)

    def cut(self, step: int) -> History:
        """Return the history without what came after `step`; a bucket that straddles it goes too."""
        kept = tuple(bucket for bucket in self.buckets if bucket.last <= step)
        if not kept:
            return History()
        end = kept[-1]
        known = math.isfinite(end.smooth)
        weight = 1.0 if known else 0.0
        return replace(
            self,
            sealed=kept,
            filling=None,
            smooth_sum=end.smooth if known else 0.0,
            smooth_weight=weight,
            bad=sum(bucket.bad for bucket in kept),
        )


def _grown(bucket: Bucket | None, step: int, loss: float, smooth: float) -> Bucket:
    finite = math.isfinite(loss)
    if bucket is None:
        low, high = (loss, loss) if finite else (math.inf, -math.inf)
        return Bucket(step, step, low, high, smooth, 1, int(not finite))
    low, high = (min(bucket.low, loss), max(bucket.high, loss)) if finite else (bucket.low, bucket.high)
    return Bucket(bucket.first, step, low, high, smooth, bucket.count + 1, bucket.bad + (not finite))


def _halved(buckets: tuple[Bucket, ...]) -> tuple[Bucket, ...]:
    pairs = zip(buckets[::2], buckets[1::2], strict=False)
    merged = [_joined(left, right) for left, right in pairs]
    return (*merged, buckets[-1]) if len(buckets) % 2 else tuple(merged)


def _joined(left: Bucket, right: Bucket) -> Bucket:
    low, high = min(left.low, right.low), max(left.high, right.high)
    return Bucket(left.first, right.last, low, high, right.smooth, left.count + right.count, left.bad + right.bad)
