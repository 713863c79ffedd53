"""Curves in dots: two by four of them in a cell as braille, or one where only ASCII is shown.

plotext can draw these too, but sorts the dots of each cell out in a time that grows with their square: 48 ms for a plot of
198 by 24 cells, which a run in the same process would feel every second. This takes a tenth of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

_BITS = ((0x40, 0x04, 0x02, 0x01), (0x80, 0x20, 0x10, 0x08))  # by column, from the lowest dot up
_SPANS = [[[sum(bits[low : high + 1]) for high in range(4)] for low in range(4)] for bits in _BITS]
Point = tuple[int, int]
"""A dot: column from the left, row from the bottom."""


class Canvas:
    """Dots of one curve in cells; `wide` and `high` say how many there are."""

    def __init__(self, columns: int, rows: int, *, ascii_only: bool = False) -> None:
        """Start empty, with `columns` by `rows` cells."""
        self.columns, self.rows = columns, rows
        self.wide, self.high = (columns, rows) if ascii_only else (2 * columns, 4 * rows)
        self._ascii = ascii_only
        self._cells = [[0] * columns for _ in range(rows)]

    def bar(self, x: int, low: int, high: int) -> None:
        """Fill the dots of column `x` from `low` to `high`; both must lie inside."""
        if self._ascii:
            for y in range(low, high + 1):
                self._cells[y][x] = 1
            return
        spans, at = _SPANS[x & 1], x >> 1
        first, last = low >> 2, high >> 2
        for cell in range(first, last + 1):
            self._cells[cell][at] |= spans[low & 3 if cell == first else 0][high & 3 if cell == last else 3]

    def line(self, points: Sequence[Point]) -> None:
        """Join dots from left to right without a gap."""
        for x, y in points[:1]:
            self.bar(x, y, y)
        for (x, y), (to_x, to_y) in itertools.pairwise(points):
            before = y
            for at in range(x + 1, to_x + 1):
                here = y + round((to_y - y) * (at - x) / (to_x - x))
                self.bar(at, min(before, here), max(before, here))
                before = here

    def row(self, index: int) -> list[int]:
        """Return the cells of a row, counted from the top: the dots of each as a number, 0 where it is empty."""
        return self._cells[self.rows - 1 - index]


def glyph(dots: int) -> str:
    """Return the character of a cell's dots."""
    return chr(0x2800 + dots)
