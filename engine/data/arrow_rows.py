"""Parquet and Arrow files, a few hundred rows at a time, through pyarrow (which comes with `datasets`).

Files are not trusted: an Arrow file is checked before its values are looked at, because its lengths and offsets point
into memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from qlora_tui.engine.aside import aside
from qlora_tui.engine.data.raw import Raw
from qlora_tui.engine.data.tape import BLOCK_BYTES, Tape
from qlora_tui.engine.errors import BadRow, DataError
from qlora_tui.engine.text import one_line

_ROWS_AT_ONCE = 256


def read_parquet(path: Path, tape: Tape) -> Iterator[Raw]:
    """Yield the rows of a Parquet file.

    Raises:
        DataError: it is cut off or damaged, or names a column twice.
    """
    from pyarrow import parquet

    size = path.stat().st_size
    tape.begin(size)
    shown = one_line(path)
    with _explained("Parquet", shown), parquet.ParquetFile(path, buffer_size=BLOCK_BYTES, pre_buffer=False) as file:
        _check_names(file.schema_arrow.names, shown)
        total, done = max(1, file.metadata.num_rows), 0
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, use_threads=False):
            yield from _rows(batch)
            done += batch.num_rows
            tape.at(size * done // total)


def read_arrow(path: Path, tape: Tape) -> Iterator[Raw]:
    """Yield the rows of an Arrow file, in its file form or its stream form (which `datasets` writes).

    It is mapped and not read, since all rows may lie in one batch.

    Raises:
        DataError: it is cut off or damaged, or names a column twice.
    """
    import pyarrow

    size = path.stat().st_size
    tape.begin(size)
    shown = one_line(path)
    with _explained("Arrow", shown), pyarrow.memory_map(str(path)) as source:
        start = source.read(6)
        source.seek(0)
        for batch, begin, end in _batches(source, shown, size, is_file=start == b"ARROW1"):
            aside(partial(batch.validate, full=True), tape.look, daemon=False)  # all rows may lie in one batch
            for first in range(0, batch.num_rows, _ROWS_AT_ONCE):
                yield from _rows(batch.slice(first, _ROWS_AT_ONCE))
                tape.at(begin + (end - begin) * first // batch.num_rows)


def _batches(source: Any, shown: str, size: int, *, is_file: bool) -> Iterator[tuple[Any, int, int]]:
    """Yield each batch with the bytes of the file where it begins and ends, as near as they are known."""
    from pyarrow import ipc

    if is_file:
        file = ipc.open_file(source)
        _check_names(file.schema.names, shown)
        total = file.num_record_batches
        for index in range(total):
            yield file.get_batch(index), size * index // total, size * (index + 1) // total
        return
    stream = ipc.open_stream(source)
    _check_names(stream.schema.names, shown)
    begin = source.tell()
    for batch in stream:
        end = source.tell()
        yield batch, begin, end
        begin = end


def _rows(batch: Any) -> Iterator[Raw]:
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):  # one value that cannot be read, such as text that is not UTF-8, fails all
        yield from (_one(batch.slice(index, 1)) for index in range(batch.num_rows))
        return
    for row in rows:
        yield Raw(None, _without_nan(row))


def _one(batch: Any) -> Raw:
    try:
        return Raw(None, _without_nan(batch.to_pylist()[0]))
    except UnicodeDecodeError:
        return Raw(None, BadRow("a text of it is not UTF-8", hint="write the file as UTF-8 again"))
    except (ValueError, OverflowError) as error:
        return Raw(None, BadRow(f"a value of it cannot be read ({one_line(error, limit=120)})"))


def _without_nan(row: Mapping[str, object]) -> dict[str, object]:
    """Return the row with NaN as missing: pandas writes it for an empty cell."""
    return {name: None if isinstance(value, float) and value != value else value for name, value in row.items()}


def _check_names(names: list[str], shown: str) -> None:
    twice = next((name for name, times in Counter(names).items() if times > 1), None)
    if twice is not None:
        raise DataError(f"two columns are called {one_line(twice, limit=60)!r}", hint="rename one of them", where=shown)


@contextmanager
def _explained(kind: str, shown: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise DataError(
            f"the {kind} file is damaged or cut off ({one_line(error, limit=160)})", hint="copy or write it again", where=shown
        ) from None
