"""Files of rows, whatever their kind, read as a stream: one row is held, and every fault has its line.

What a file is, its first bytes say; only CSV and TSV have to be told by their names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from qlora_tui.engine.data.arrow_rows import read_arrow, read_parquet
from qlora_tui.engine.data.csv_rows import read_csv
from qlora_tui.engine.data.json_rows import read_lines, read_list
from qlora_tui.engine.data.raw import BOM, Raw
from qlora_tui.engine.data.tape import Tape, open_bytes
from qlora_tui.engine.errors import DataError
from qlora_tui.engine.text import one_line

ROW_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
PACKED_ENDINGS = (".gz", ".zst", ".zstd")

_PARQUET = b"PAR1"
_ARROW = (b"ARROW1", b"\xff\xff\xff\xff")
_UNREAD = {
    b"BZh": "a bzip2 file",
    b"\xfd7zX": "an xz file",
    b"PK\x03\x04": "a ZIP archive or spreadsheet",
    b"\xff\xfe": "a UTF-16 file",
    b"\xfe\xff": "a UTF-16 file",
    b"FEA1": "an old Feather file",
    b"\x1f\x8b": "a file compressed twice",
    b"\x28\xb5\x2f\xfd": "a file compressed twice",
    _PARQUET: "a Parquet file inside a compressed one",
    _ARROW[0]: "an Arrow file inside a compressed one",
    _ARROW[1]: "an Arrow file inside a compressed one",
}
_WHAT_IS_READ = "write it as JSONL, one JSON object a line, or as CSV or Parquet"


def read_file(path: Path, tape: Tape | None = None, note: Callable[[str], None] = lambda text: None) -> Iterator[Raw]:
    """Yield the rows of a file: JSONL, a JSON list, CSV, TSV, Parquet or Arrow; the text kinds also as gzip or zstd.

    Args:
        path: the file.
        tape: told how far the reading is; what it raises to stop goes through.
        note: gets a sentence about what had to be assumed.

    Raises:
        DataError: there is no such file, it cannot be read, or it is of a kind that is not read here.
    """
    shown = one_line(path)
    if path.is_dir():
        raise DataError("this is a folder", hint="name a file in it", where=shown)
    if not path.exists():
        raise DataError("no such file", where=shown)
    if not path.is_file():
        raise DataError("this is no file", where=shown)
    tape = tape or Tape()
    try:
        yield from _read(path, tape, note)
    except OSError as error:
        raise DataError(f"the file cannot be read ({error.strerror or error})", where=shown) from None


def file_ending(name: str) -> str:
    """Return the ending that says what kind of rows a file of that name holds, `.csv` of `a.CSV.gz`; empty if none does."""
    plain = name.lower()
    plain = next((plain.removesuffix(ending) for ending in PACKED_ENDINGS if plain.endswith(ending)), plain)
    return next((ending for ending in ROW_ENDINGS if plain.endswith(ending)), "")


def _read(path: Path, tape: Tape, note: Callable[[str], None]) -> Iterator[Raw]:
    with path.open("rb", buffering=0) as plain:
        start = plain.read(8)
    ending = path.suffix.lower()  # a table file with a broken start must not be read as lines
    if start.startswith(_PARQUET) or ending == ".parquet":
        return (yield from read_parquet(path, tape))
    if start.startswith(_ARROW) or ending == ".arrow":
        return (yield from read_arrow(path, tape))
    with open_bytes(path, tape) as file:
        yield from _read_text(path, file, tape, note)
    return None


def _read_text(path: Path, file: IO[bytes], tape: Tape, note: Callable[[str], None]) -> Iterator[Raw]:
    shown = one_line(path)
    start = file.peek(4096) if hasattr(file, "peek") else b""  # a BufferedReader, which IO does not promise
    _refuse_kind(start, shown)
    ending = file_ending(path.name)
    text = start.removeprefix(BOM).lstrip()
    if ending in (".csv", ".tsv"):
        rows = read_csv(file, shown, "\t" if ending == ".tsv" else "", note)
    elif text.startswith(b"["):
        rows = read_list(file, shown)
    else:
        _refuse_one_object(text, ending, shown)
        rows = read_lines(file)
    for row in rows:
        tape.look()
        yield row


def _refuse_kind(start: bytes, shown: str) -> None:
    """Refuse a whole file in one sentence, where line by line each would be refused without saying why."""
    kind = next((name for mark, name in _UNREAD.items() if start.startswith(mark)), "")
    if kind:
        hint = "save it as UTF-8" if "UTF-16" in kind else "unpack it first" if "compressed" in kind else _WHAT_IS_READ
        raise DataError(f"{kind} is not read here", hint=hint, where=shown)


def _refuse_one_object(text: bytes, ending: str, shown: str) -> None:
    """Refuse a .json file that begins an object over many lines: it holds one value and not rows, whatever is inside."""
    if ending == ".json" and text.split(b"\n", 1)[0].strip() == b"{":
        raise DataError(
            "the file holds one JSON object and not rows", hint="write its rows as a JSON list, or one object a line", where=shown
        )
