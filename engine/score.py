"""What a comparison of base and tuned is called, by its size and its interval together. Arithmetic alone."""

from __future__ import annotations

import statistics

IMPROVEMENT_NATS = 0.5
"""A drop of this much on held-out answers is called a measurable improvement."""


def verdict(drop: float, interval: tuple[float, float]) -> str:
    """Say in one sentence what the comparison shows; both the size and the interval count."""
    low, high = interval
    if low > 0 and drop >= IMPROVEMENT_NATS:
        return f"a measurable improvement: the average held-out row is {drop:.2f} nats a token more likely"
    if low > 0:
        return f"better, but by less than {IMPROVEMENT_NATS} nats: {drop:.2f}"
    if high < 0:
        return f"worse than the base by {-drop:.2f} nats: do not use this adapter"
    return f"no clear change: {drop:+.2f} nats, and the interval holds zero"


def manner_alone(gain: float, other_gain: float) -> str:
    """Return the verdict on a gain, in nats a token, that answers made after any question: it replaces that of `verdict`."""
    told = f"held-out answers gained {gain:.2f} nats a token after their own question and {other_gain:.2f} after another one"
    return f"no clear improvement beyond manner: {told}"


def student_t(freedom: int) -> float:
    """Return the two-sided 95 % quantile of Student's t.

    Source: the expansion in 1/freedom (Abramowitz and Stegun 26.7.5); within 1 % from 4 degrees on, and
    too narrow below, where no interval should be trusted anyway.
    """
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return float(sum(term / freedom**power for power, term in enumerate(terms)))
