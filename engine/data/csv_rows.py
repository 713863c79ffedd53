"""CSV and TSV files: a line of names, then rows; texts may hold line breaks inside quotes.

The reader is Python's own in its strict mode. It is fed line by line, so that a fault is named by its line and costs
one row. Cells are text and stay as they are: `=1+2` is the text `=1+2`, and 007 stays 007.
"""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO

from qlora_tui.engine.data import json_rows, raw
from qlora_tui.engine.data.raw import Raw
from qlora_tui.engine.errors import BadRow, DataError
from qlora_tui.engine.text import one_line

_DELIMITERS = ",;\t|"


def read_csv(file: IO[bytes], shown: str, delimiter: str, note: Callable[[str], None]) -> Iterator[Raw]:
    """Yield the rows below the line of names; `delimiter` empty: the one of `,;|` and tab that the line of names holds most.

    Raises:
        DataError: there is no line of names, it is broken, or it says a name twice.
    """
    csv.field_size_limit(max(csv.field_size_limit(), raw.MAX_ROW_BYTES))  # its usual limit is 128 KiB; it can only be set for all
    lines = _Lines(file)
    first = next(lines, "")
    while first and not first.strip():
        first = next(lines, "")
    if not first:
        return
    chosen = delimiter or _delimiter(first)
    if not delimiter and chosen != ",":
        note(f"{shown}: its columns are taken apart at {'tabs' if chosen == chr(9) else chosen}.")
    skipped = lines.number - 1
    reader = csv.reader(itertools.chain([first], lines), delimiter=chosen, strict=True)
    names = _names(reader, lines, shown)
    while True:
        begin = skipped + reader.line_num + 1
        lines.fault, lines.held = None, 0
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield Raw(begin, lines.fault or _broken(error, begin, skipped + reader.line_num))
            continue
        if cells is None:
            return
        if cells or lines.fault:
            yield Raw(begin, lines.fault or _row(names, cells))


class _Lines:
    """The lines of a file as text.

    `fault` says what is wrong with a line, and `held` how long the lines are, since somebody last set them to None and 0.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.number = file, 0
        self.fault: BadRow | None = None
        self.held = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        block = self._file.readline(raw.MAX_ROW_BYTES + 1)
        if not block:
            raise StopIteration
        self.number += 1
        self.held += len(block)
        if self.held > 4 * raw.MAX_ROW_BYTES:
            raise DataError(f"a row that ends after line {self.number} is too long", hint="is a closing quote missing?")
        if self.number == 1:
            block = block.removeprefix(raw.BOM)
        if len(block) > raw.MAX_ROW_BYTES:
            json_rows.skip_line(self._file, block)
            self.fault = raw.too_long(raw.MAX_ROW_BYTES)
            return "\n"
        try:
            return block.decode("utf-8")
        except UnicodeDecodeError as error:
            self.fault = BadRow(f"line {self.number} is not UTF-8 (byte {error.start + 1})", hint="save the file as UTF-8")
            return block.decode("utf-8", "replace")


def _delimiter(line: str) -> str:
    outside = "".join(line.split('"')[::2])  # what is inside quotes is no delimiter
    return max(_DELIMITERS, key=outside.count)  # the first of equals: a comma


def _names(reader: Iterator[list[str]], lines: _Lines, shown: str) -> list[str]:
    try:
        cells = next(reader)
    except csv.Error as error:
        raise DataError(f"the line of column names is broken ({one_line(error, limit=120)})", where=shown) from None
    if lines.fault is not None:
        raise DataError(f"the line of column names cannot be read: {lines.fault.problem.message}", where=shown)
    names = [cell.strip() or f"column {index}" for index, cell in enumerate(cells, 1)]
    twice = next((name for name, times in Counter(names).items() if times > 1), None)
    if twice is not None:
        raise DataError(f"two columns are called {one_line(twice, limit=60)!r}", hint="rename one of them", where=shown)
    return names


def _broken(error: csv.Error, begin: int, end: int) -> BadRow:
    words = str(error)
    where = f" (lines {begin} to {end})" if end > begin else ""
    if "unexpected end" in words:
        return BadRow(f"a quote that opens in line {begin} is never closed{where}", hint='write a quote inside a text as ""')
    if "expected after" in words:
        return BadRow(f"text follows a closing quote{where}", hint='write a quote inside a text as ""')
    if "field larger" in words:
        return BadRow(f"a text of it is longer than {raw.MAX_ROW_BYTES // 2**20} MiB{where}", hint="is a closing quote missing?")
    return BadRow(f"the row cannot be read: {one_line(words, limit=120)}{where}")


def _row(names: Sequence[str], cells: Sequence[str]) -> Mapping[str, object] | BadRow:
    if len(cells) != len(names):
        return BadRow(
            f"it has {len(cells)} columns and the first line names {len(names)}", hint="a text that holds the delimiter needs quotes"
        )
    return dict(zip(names, cells, strict=True))
