"""Files of rows, read line by line, so that one broken line costs one line and is named.

The usual readers drop a whole file for one broken line, or guess at its types. This one streams, holds one
line in memory, limits how long a line may be, and hands every fault on with its line number.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from qlora_tui.engine.errors import BadRow, DataError
from qlora_tui.engine.text import one_line

MAX_LINE_BYTES = 16 * 2**20
"""A longer line is refused unread: no row of text to train on is that long, and a hostile one must not fill the memory."""
MAX_LIST_BYTES = 512 * 2**20
"""A JSON list has to be read whole, unlike JSONL."""

_BOM = b"\xef\xbb\xbf"
_MARKS = {
    b"PAR1": "a Parquet file",
    b"ARRO": "an Arrow file",
    b"\x1f\x8b": "a compressed file",
    b"\x28\xb5\x2f\xfd": "a compressed file",
    b"BZh": "a compressed file",
    b"\xfd7zX": "a compressed file",
    b"PK\x03\x04": "a ZIP archive or spreadsheet",
}
_ENDINGS = {".csv": "a CSV file", ".tsv": "a TSV file"}


@dataclass(frozen=True, slots=True)
class Raw:
    """One row as found: its line (None where there are no lines) and its fields, or what is wrong with it."""

    line: int | None
    fields: Mapping[str, object] | BadRow


def read_file(path: Path) -> Iterator[Raw]:
    """Yield the rows of a JSONL file, or of a JSON file that holds one list.

    Raises:
        DataError: there is no such file, it cannot be read, or it is of a kind that is not read here.
    """
    shown = one_line(path)
    if path.is_dir():
        raise DataError("this is a folder", hint="name a JSONL file in it", where=shown)
    if not path.exists():
        raise DataError("no such file", where=shown)
    try:
        with path.open("rb") as file:
            _refuse_kind(path, file)
            yield from _read_list(file) if _is_list(file) else _read_lines(file)
    except OSError as error:
        raise DataError(f"the file cannot be read ({error.strerror or error})", where=shown) from None


def _refuse_kind(path: Path, file: IO[bytes]) -> None:
    """Refuse a whole file in one sentence, where line by line each would be refused without saying why."""
    start = file.read(4)
    file.seek(0)
    kind = next((name for mark, name in _MARKS.items() if start.startswith(mark)), "") or _ENDINGS.get(path.suffix.lower(), "")
    if kind:
        raise DataError(
            f"{kind} is not read here", hint="write it as JSONL, one JSON object a line, or as a JSON list", where=one_line(path)
        )


def _is_list(file: IO[bytes]) -> bool:
    start = file.read(4096).removeprefix(_BOM).lstrip()
    file.seek(0)
    return start.startswith(b"[")


def _read_lines(file: IO[bytes]) -> Iterator[Raw]:
    number = 0
    while block := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            block = block.removeprefix(_BOM)
        if len(block) > MAX_LINE_BYTES:
            _skip_line(file, block)
            yield Raw(
                number, BadRow(f"the line is longer than {MAX_LINE_BYTES // 2**20} MiB", hint="one row a line; is a line break missing?")
            )
        elif block.strip():
            yield Raw(number, _parse_line(block))


def _skip_line(file: IO[bytes], block: bytes) -> None:
    while block and not block.endswith(b"\n"):
        block = file.readline(2**20)


def _parse_line(block: bytes) -> Mapping[str, object] | BadRow:
    try:
        return _as_row(_decode(block.decode("utf-8")))
    except UnicodeDecodeError as error:
        return BadRow(f"the line is not UTF-8 (byte {error.start + 1})", hint="save the file as UTF-8")
    except json.JSONDecodeError as error:
        return BadRow(f"the line is not JSON: {error.msg} at character {error.pos + 1}")
    except (ValueError, RecursionError):
        return BadRow("the line is JSON that is nested too deeply or holds a value that cannot be read")


def _decode(text: str) -> object:
    """Parse JSON with numbers kept as they are written: 1.10 stays 1.10, and NaN counts as missing."""
    return json.loads(text, parse_int=str, parse_float=str, parse_constant=_missing)


def _missing(_name: str) -> None:
    """Read NaN and Infinity, which some tools write for an empty cell, as no value."""


def _as_row(value: object) -> Mapping[str, object] | BadRow:
    if isinstance(value, dict):
        return value
    return BadRow("a row must be an object such as {...}", hint="one object a line")


def _read_list(file: IO[bytes]) -> Iterator[Raw]:
    block = file.read(MAX_LIST_BYTES + 1).removeprefix(_BOM)
    if len(block) > MAX_LIST_BYTES:
        raise DataError(
            f"a JSON list of more than {MAX_LIST_BYTES // 2**20} MiB",
            hint="write it as JSONL: one object a line",
            where=one_line(file.name),
        )
    try:
        text = block.decode("utf-8")
        items = _decode(text)
    except UnicodeDecodeError as error:
        raise DataError(f"the file is not UTF-8 (byte {error.start + 1})", hint="save it as UTF-8", where=one_line(file.name)) from None
    except json.JSONDecodeError as error:
        fault = f"the JSON list is broken: {error.msg} at line {error.lineno}, character {error.colno}"
        raise DataError(fault, hint="write it as JSONL and only the broken row is lost", where=one_line(file.name)) from None
    except (ValueError, RecursionError):
        raise DataError("the JSON list is nested too deeply", where=one_line(file.name)) from None
    for item in items if isinstance(items, list) else [items]:
        yield Raw(None, _as_row(item))
