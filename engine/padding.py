"""How much of padded batches is padding, from the lengths of the rows alone: what laying them end to end would save.

Batches are made of neighbours by length among the rows of a few steps (`batches.epoch_order`), so few rows at once are
nearly alike, and many are not.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

STEPS_PER_BUCKET = 8
"""Rows of so many steps are sorted together: little padding, and steps still mix rows of the whole set."""


def spread(lengths: Sequence[int], number: int) -> list[int]:
    """Return at most `number` of `lengths`, ascending, that stand for all: the middles of equally large groups.

    >>> spread([30, 10, 40, 20], 2)
    [20, 40]
    """
    ordered, used = sorted(lengths), min(len(lengths), number)
    return [ordered[(2 * index + 1) * len(ordered) // (2 * used)] for index in range(used)]


def bucket(lengths: Sequence[int], rows_per_step: int) -> tuple[int, ...]:
    """Return the lengths that rows sorted together have as a rule, ascending."""
    return tuple(spread(lengths, STEPS_PER_BUCKET * rows_per_step))


def row_of_largest(longest: Iterable[int], rows: int) -> int:
    """Return the tokens of a row of the largest batch of `rows` rows end to end, were they all alike: the mean, rounded up.

    Its tokens decide memory, not its longest row.

    >>> row_of_largest([10, 40, 20, 30], 3)
    30
    """
    most = heapq.nlargest(rows, longest)
    return -(-sum(most) // len(most))


def padded_share(ordered: Sequence[int], rows: int) -> float:
    """Return which share of batches of `rows` neighbours is padding, `ordered` being the lengths of rows sorted together.

    >>> padded_share([10, 20, 30, 40], 2)
    0.16666666666666666
    """
    whole = sum(max(part) * len(part) for start in range(0, len(ordered), rows) if (part := ordered[start : start + rows]))
    return 1 - sum(ordered) / whole if whole else 0.0
