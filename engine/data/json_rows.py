"""JSON files: one object a line, or one list of objects, both read piece by piece.

The usual readers drop a whole file for one broken line, or hold a list whole in memory. Here one broken line costs one
line, and a list is read as far as its next item.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Iterator, Mapping
from typing import IO

from qlora_tui.engine.data import raw
from qlora_tui.engine.data.raw import Raw
from qlora_tui.engine.data.tape import BLOCK_BYTES
from qlora_tui.engine.errors import BadRow, DataError

_MOST_DIGITS = 4000
_SPACES = " \t\r\n"


class Written(float):
    """A number that shows itself as the file has it: 1.10 stays 1.10 in a text, and is 1.1 to whoever calculates."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> Written:
        """Keep the text beside the number."""
        made = super().__new__(cls, text)
        made.text = text
        return made

    def __str__(self) -> str:
        return self.text


def read_lines(file: IO[bytes]) -> Iterator[Raw]:
    """Yield the row of each line that is not empty; what is wrong with a line is said in its place."""
    number = 0
    while block := file.readline(raw.MAX_ROW_BYTES + 1):
        number += 1
        if number == 1:
            block = block.removeprefix(raw.BOM)
        if len(block) > raw.MAX_ROW_BYTES:
            skip_line(file, block)
            yield Raw(number, raw.too_long(raw.MAX_ROW_BYTES))
        elif block.strip():
            yield Raw(number, _parse_line(block))


def skip_line(file: IO[bytes], block: bytes) -> None:
    """Read on to the end of a line that began with `block`, keeping nothing."""
    while block and not block.endswith(b"\n"):
        block = file.readline(BLOCK_BYTES)


def read_list(file: IO[bytes], shown: str) -> Iterator[Raw]:
    """Yield the items of a file that holds one JSON list, each with the line that it begins on.

    Raises:
        DataError: what is no JSON in it, with the line: after it nobody can tell where the next item begins.
    """
    scroll = _Scroll(file, shown)
    scroll.next_sign()
    scroll.step()
    if scroll.next_sign() == "]":
        return
    while True:
        scroll.next_sign()
        line = scroll.line
        yield Raw(line, _as_row(scroll.item()))
        sign = scroll.next_sign()
        if sign not in (",", "]"):
            raise scroll.broken("a comma or the end of the list was expected")
        scroll.step()
        if sign == "]":
            break
    if scroll.next_sign():
        raise scroll.broken("something follows the end of the list")


def parse(text: str) -> object:
    """Parse JSON; numbers show themselves as they are written, NaN counts as missing.

    Raises:
        ValueError, RecursionError: it is no JSON, or nested too deeply.
    """
    return _DECODER.decode(text)


class _Scroll:
    """The text of a file as far as it is needed: it grows at its end and forgets what was used."""

    def __init__(self, file: IO[bytes], shown: str) -> None:
        self._file, self._shown = file, shown
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._place, self._read, self._ended = "", 0, 0, False
        self.line = 1

    def next_sign(self) -> str:
        """Go to the next character that is no space and return it; empty at the end."""
        while True:
            rest = len(self._text)
            place = self._place
            while place < rest and self._text[place] in _SPACES:
                place += 1
            self._use(place)
            if place < rest or not self._more():
                return self._text[self._place : self._place + 1]

    def step(self) -> None:
        """Go one character on."""
        self._use(self._place + 1)

    def item(self) -> object:
        """Return the value that begins here and go behind it.

        An item that does not end in what was read may be broken or only cut: more is read, as much again each time,
        so that an item is parsed a few times at most.
        """
        while True:
            end, fault = -1, ""
            try:
                value, end = _DECODER.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                fault, self._fault_at = error.msg, error.pos
            except (ValueError, RecursionError):
                raise DataError("the JSON list is nested too deeply", where=self._shown) from None
            if 0 <= end < len(self._text) or not self._more():
                break
        if fault:
            raise self.broken(fault, self._fault_at)
        self._use(end)
        return value

    def broken(self, fault: str, place: int | None = None) -> DataError:
        """Return what is said about a list that cannot be read on."""
        line = self.line + self._text.count("\n", self._place, place or self._place)
        return DataError(
            f"the JSON list is broken: {fault} at line {line}", hint="write it as JSONL and only the broken row is lost", where=self._shown
        )

    def _use(self, end: int) -> None:
        self.line += self._text.count("\n", self._place, end)
        self._place = end

    def _more(self) -> bool:
        held = len(self._text) - self._place
        if self._ended:
            return False
        if held > raw.MAX_ROW_BYTES:
            raise DataError(
                f"one item of the JSON list, at line {self.line}, is broken or longer than {raw.MAX_ROW_BYTES // 2**20} MiB",
                hint="write it as JSONL: one object a line",
                where=self._shown,
            )
        block = self._file.read(max(BLOCK_BYTES, held))
        self._ended = not block
        try:
            self._text = self._text[self._place :] + self._decoder.decode(block, self._ended)
        except UnicodeDecodeError as error:
            place = self._read + error.start + 1
            raise DataError(f"the file is not UTF-8 (near byte {place})", hint="save it as UTF-8", where=self._shown) from None
        self._place, self._read = 0, self._read + len(block)
        return not self._ended


def _parse_line(block: bytes) -> Mapping[str, object] | BadRow:
    try:
        return _as_row(parse(block.decode("utf-8")))
    except UnicodeDecodeError as error:
        return BadRow(f"the line is not UTF-8 (byte {error.start + 1})", hint="save the file as UTF-8")
    except json.JSONDecodeError as error:
        return BadRow(f"the line is not JSON: {error.msg} at character {error.pos + 1}")
    except (ValueError, RecursionError):
        return BadRow("the line is JSON that is nested too deeply or holds a value that cannot be read")


def _as_row(value: object) -> Mapping[str, object] | BadRow:
    if isinstance(value, dict):
        return value
    return BadRow("a row must be an object such as {...}", hint="one object a line")


def _whole(text: str) -> int | str:
    """Read a whole number; one that would not be written the same again, or that Python refuses for its length, stays text."""
    return text if len(text) > _MOST_DIGITS or text == "-0" else int(text)


def _decimal(text: str) -> float | str:
    number = float(text)
    if not math.isfinite(number):
        return text
    return number if repr(number) == text else Written(text)


def _missing(_name: str) -> None:
    """Read NaN and Infinity, which some tools write for an empty cell, as no value."""


_DECODER = json.JSONDecoder(parse_int=_whole, parse_float=_decimal, parse_constant=_missing)
