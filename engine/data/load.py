"""From what a person named to rows: files, hub datasets and what is built in, read, recognised and checked.

Every row that is not used is remembered with its place and the reason. Without `skip_bad_rows` the first one
stops the run, because a run that quietly trains on half the data is the worse surprise.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_tui.engine.data.builtin_docs import NAME as PYTHON_DOCS
from qlora_tui.engine.data.builtin_docs import read_docs
from qlora_tui.engine.data.chat import Format, Refusal, Row
from qlora_tui.engine.data.formats import detect
from qlora_tui.engine.data.hub_rows import is_hub_name, read_hub
from qlora_tui.engine.data.reader import Raw, read_file
from qlora_tui.engine.errors import BadRow, DataError
from qlora_tui.engine.spec import BUILTIN, RunConfig, nearest
from qlora_tui.engine.text import one_line

_LOOKED_AT = 64
_SKIP = "--skip-bad-rows goes on without it"


@dataclass(frozen=True, slots=True)
class Source:
    """One thing named as data, and how many usable rows it gave in which format."""

    name: str
    format: str
    rows: int


@dataclass(frozen=True, slots=True)
class Dataset:
    """Usable rows and refused ones, the format and why, numbered over all sources from 1."""

    rows: tuple[Row, ...]
    refused: tuple[Refusal, ...] = ()
    format: str = ""
    why: str = ""
    sources: tuple[Source, ...] = ()


def load(run: RunConfig, *, lenient: bool = False) -> Dataset:
    """Read `run.data`, all sources one after the other.

    With `lenient`, broken rows and a dataset without a usable row are returned instead of raised: a report on
    a dataset lists every fault, a run must not start on one.

    Raises:
        BadRow: a row that cannot be used, unless `skip_bad_rows`: row, line, field, and what to do.
        DataError: something named is not there or cannot be read, no format fits, or no row is usable.
        FetchError: the hub could not be reached.
    """
    return _read_all(run.data, run, lenient=lenient)


def load_eval(run: RunConfig, *, lenient: bool = False) -> Dataset | None:
    """Read `run.eval_data` the same way; None when none is named.

    Raises:
        BadRow, DataError, FetchError: as `load`.
    """
    return _read_all((run.eval_data,), run, lenient=lenient) if run.eval_data else None


def _read_all(names: tuple[str, ...], run: RunConfig, *, lenient: bool) -> Dataset:
    parts: list[Dataset] = []
    for name in names:
        first = 1 + sum(len(part.rows) + len(part.refused) for part in parts)
        part = _read_one(name, run.data_format, first, stop=not (lenient or run.skip_bad_rows), lenient=lenient)
        parts.append(part)
    rows = tuple(itertools.chain.from_iterable(part.rows for part in parts))
    refused = tuple(itertools.chain.from_iterable(part.refused for part in parts))
    if not rows and not lenient:
        raise _nothing(names, refused)
    return Dataset(
        rows=rows,
        refused=refused,
        format=", ".join(dict.fromkeys(part.format for part in parts if part.format)),
        why="; ".join(dict.fromkeys(part.why for part in parts)),
        sources=tuple(itertools.chain.from_iterable(part.sources for part in parts)),
    )


def _read_one(name: str, wanted: str, first: int, *, stop: bool, lenient: bool) -> Dataset:
    raws = _open(name)
    numbered = zip(itertools.count(first), raws, strict=False)
    ahead = list(itertools.islice(numbered, _LOOKED_AT))
    look = [raw.fields for _, raw in ahead if not isinstance(raw.fields, BadRow)]
    form: Format | None = None
    why = f"{one_line(name)} holds no row that can be read"
    try:
        form, why = detect(look, wanted) if look else (None, why)
    except DataError as error:
        if not lenient:
            raise DataError(error.problem.message, hint=error.problem.hint, where=one_line(name)) from None
        why = error.problem.message
    rows: list[Row] = []
    refused: list[Refusal] = []
    for number, raw in itertools.chain(ahead, numbered):
        row = _read_row(number, raw, form, why)
        if isinstance(row, Row):
            rows.append(row)
        elif stop:
            raise _stopping(row, name)
        else:
            refused.append(replace(row, source=name))
    source = Source(name, form.name if form else "", len(rows))
    return Dataset(tuple(rows), tuple(refused), source.format, why, (source,))


def _read_row(number: int, raw: Raw, form: Format | None, why: str) -> Row | Refusal:
    if isinstance(raw.fields, BadRow):
        return _refusal(number, raw.line, raw.fields)
    if form is None:
        return Refusal(number, raw.line, "", why)
    try:
        return Row(number, raw.line, form.read(raw.fields))
    except BadRow as error:
        return _refusal(number, raw.line, error)
    except RecursionError:
        return Refusal(number, raw.line, "", "the row is nested too deeply")


def _refusal(number: int, line: int | None, error: BadRow) -> Refusal:
    hint = f"; {error.problem.hint}" if error.problem.hint else ""
    return Refusal(number, line, error.field, error.problem.message + hint)


def _stopping(refusal: Refusal, name: str) -> BadRow:
    line = f", line {refusal.line}" if refusal.line else ""
    field = f"field {one_line(refusal.field, limit=80)}: " if refusal.field else ""
    where = f"{one_line(name)}, row {refusal.row}{line}"
    return BadRow(field + refusal.reason, row=refusal.row, field=refusal.field, hint=_SKIP, where=where)


def _nothing(names: tuple[str, ...], refused: tuple[Refusal, ...]) -> DataError:
    where = ", ".join(one_line(name) for name in names)
    if not refused:
        return DataError("there is no row in it", hint="one JSON object a line is expected", where=where)
    first = refused[0]
    field = f", field {one_line(first.field, limit=80)}" if first.field else ""
    fault = f"none of its {len(refused)} rows can be used; the first: row {first.row}{field}: {first.reason}"
    return DataError(fault, hint="qlora-tui data PATH lists them all", where=where)


def _open(name: str) -> Iterator[Raw]:
    if name == PYTHON_DOCS:
        return _from_rows(read_docs())
    if name.startswith(BUILTIN):
        hint = nearest(name, [PYTHON_DOCS]) or f"there is {PYTHON_DOCS}"
        raise DataError("no such data is built in", hint=hint, where=one_line(name))
    try:
        path = Path(name).expanduser()
        there = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"this cannot be a file name ({one_line(error, limit=120)})", where=one_line(name)) from None
    if not there and is_hub_name(name):
        return _from_rows(read_hub(name))
    return read_file(path)


def _from_rows(rows: Iterator[Mapping[str, object]]) -> Iterator[Raw]:
    return (Raw(None, row) for row in rows)
