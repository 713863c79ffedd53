"""Which steps of a run are followed by a measurement or a checkpoint: counted before a run and during one by the same rule."""

from __future__ import annotations

import math

EVALS, SAVES = 5, 10
"""How often a run is measured and saved when nobody says otherwise."""
LAST_WORDS = (0.2, 0.6, 2.5)
"""Seconds (low, mid, high) of the tokenizer's files and the report, beside the adapter, which takes about as long as a checkpoint."""


def cadence(asked: int, total: int, times: int) -> int:
    """Return every how many steps something happens: as asked, else about `times` a run."""
    return asked or max(1, -(-total // times))


def measurements(step: int, total: int, every: int) -> int:
    """Return how often the hold-out is still measured after `step` of `total`: on the way, and once at the end.

    >>> measurements(0, 100, 20), measurements(20, 100, 20), measurements(99, 100, 20)
    (5, 4, 1)
    """
    return max(0, (total - 1) // every - step // every) + 1


def saves(step: int, total: int, every: int, evals: int) -> tuple[int, int]:
    """Return how many checkpoints are still written after `step`: if no measurement on the way is the best so far, and if each is.

    Args:
        step: the last step done.
        total: the last step there is; it is always saved.
        every: steps from one regular checkpoint to the next.
        evals: steps from one measurement to the next; the best one so far is saved too.

    >>> saves(0, 100, 50, 20), saves(60, 100, 50, 20)
    ((2, 6), (1, 2))
    """
    if step >= total:
        return 0, 0
    regular = (total - 1) // every - step // every + 1
    both = math.lcm(every, evals)
    beside = ((total - 1) // evals - step // evals) - ((total - 1) // both - step // both)
    return regular, regular + beside
