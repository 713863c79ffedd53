"""Token rows as arrays in files: opened in no time, read where they are used, and no more in memory than is looked at.

Four bytes a token and one for its mask. Rows are made when they are asked for; lengths and numbers of all rows can be had
without making any.
"""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, overload

from qlora_tui.engine.data.render import TokenRow

IDS, MASK, NUMBERS, ENDS = "ids", "mask", "numbers", "ends"
Columns = Mapping[str, memoryview]
"""Columns of bytes by name."""


class TokenRows(Sequence[TokenRow]):
    """Some rows of a store in an order of their own, each made when it is asked for."""

    def __init__(self, columns: Columns, places: Sequence[int]) -> None:
        """Show the rows at `places` of the store."""
        self._ids, self._mask = columns[IDS], columns[MASK]
        self._numbers, self._ends = columns[NUMBERS].cast("q"), columns[ENDS].cast("q")
        self._places = places

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> TokenRow: ...
    @overload
    def __getitem__(self, index: slice) -> TokenRows: ...
    def __getitem__(self, index: int | slice) -> TokenRow | TokenRows:
        """Return one row, or some of the rows as they are stored."""
        if isinstance(index, slice):
            return self._part(self._places[index])
        return self._row(self._places[index])

    def at(self, indices: Sequence[int]) -> TokenRows:
        """Return the rows at `indices`, in that order, as they are stored."""
        return self._part(array("q", (self._places[index] for index in indices)))

    def __iter__(self) -> Iterator[TokenRow]:
        """Go through the rows."""
        return map(self._row, self._places)

    def __eq__(self, other: object) -> bool:
        """Say whether the other rows are the same, to the token."""
        if not isinstance(other, Sequence) or len(self) != len(other):
            return NotImplemented if not isinstance(other, Sequence) else False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    @property
    def lengths(self) -> array[int]:
        """Tokens of each row."""
        import numpy as np

        ends = np.concatenate((np.zeros(1, np.int64), np.frombuffer(self._ends, np.int64)))
        places = np.asarray(self._places, np.int64)
        return array("i", (ends[places + 1] - ends[places]).astype(np.int32).tobytes())

    @property
    def numbers(self) -> array[int]:
        """Number of each row in its data."""
        return array("q", (self._numbers[place] for place in self._places))

    def _part(self, places: Sequence[int]) -> TokenRows:
        part = TokenRows.__new__(TokenRows)
        part._ids, part._mask, part._numbers, part._ends = self._ids, self._mask, self._numbers, self._ends
        part._places = places
        return part

    def _row(self, place: int) -> TokenRow:
        start, end = self._ends[place - 1] if place else 0, self._ends[place]
        return TokenRow(self._numbers[place], array("i", bytes(self._ids[4 * start : 4 * end])), bytes(self._mask[start:end]))


def lengths_of(rows: Sequence[TokenRow]) -> Sequence[int]:
    """Return the tokens of each row without making the rows where they lie in a store."""
    return rows.lengths if isinstance(rows, TokenRows) else [len(row.input_ids) for row in rows]


def numbers_of(rows: Sequence[TokenRow]) -> Sequence[int]:
    """Return the number of each row without making the rows where they lie in a store."""
    return rows.numbers if isinstance(rows, TokenRows) else [row.row for row in rows]


@dataclass(slots=True)
class Writer:
    """Takes token rows one by one; `ids` and `mask` go to their files at once."""

    ids: BinaryIO
    mask: BinaryIO
    numbers: array[int]
    ends: array[int]
    supervised: array[int]
    highest: int = 0

    @classmethod
    def into(cls, ids: BinaryIO, mask: BinaryIO) -> Writer:
        """Begin an empty store in two files."""
        return cls(ids, mask, array("q"), array("q"), array("i"))

    def __len__(self) -> int:
        """Return how many rows were written."""
        return len(self.ends)

    def add(self, row: TokenRow) -> None:
        """Write one row.

        Raises:
            OSError: the disk is full.
        """
        self.ids.write(row.input_ids.tobytes())
        self.mask.write(row.trained)
        self.numbers.append(row.row)
        self.supervised.append(row.trained.count(1))
        self.ends.append((self.ends[-1] if self.ends else 0) + len(row.input_ids))
        self.highest = max(self.highest, max(row.input_ids))


def mapped(path: Path) -> memoryview:
    """Return a file's bytes as they lie on the disk; an empty file as no bytes, which cannot be mapped."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
