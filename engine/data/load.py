"""From what a person named to rows: files, folders, hub datasets and what is built in, read, recognised and checked.

Every row that is not used is remembered with its place and the reason. Without `skip_bad_rows` the first one
stops the run, because a run that quietly trains on half the data is the worse surprise. Rows stream from their
files to a store that holds few of them in memory, so data may be larger than the memory.
"""

from __future__ import annotations

import itertools
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_tui.engine.data import mixture, row_store, sources
from qlora_tui.engine.data.chat import Placed, Refusal, Row
from qlora_tui.engine.data.formats import detect
from qlora_tui.engine.data.mapped import Mapped, refusal
from qlora_tui.engine.data.raw import Raw
from qlora_tui.engine.data.tape import Progress, Stopping, Tape
from qlora_tui.engine.errors import BadRow, DataError
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.text import one_line
from qlora_tui.engine.units import count

_LOOKED_AT = 64
_SKIP = "--skip-bad-rows goes on without it"


@dataclass(frozen=True, slots=True)
class Source:
    """One thing named as data, and how many of its rows are used, in which format."""

    name: str
    format: str
    rows: int


@dataclass(frozen=True, slots=True)
class Dataset:
    """Usable rows and refused ones, the format and why, numbered over all sources from 1.

    Rows and refusals may lie on the disk: index them or go through them, and hold no more than needed. `notes` are
    sentences about what was decided on the way, for whoever tells what is trained. `longest` is the characters of the longest row.
    """

    rows: Sequence[Row]
    refused: Sequence[Refusal] = ()
    format: str = ""
    why: str = ""
    sources: tuple[Source, ...] = ()
    notes: tuple[str, ...] = ()
    longest: int = 0


def load(
    run: RunConfig, *, lenient: bool = False, stopping: Stopping = lambda: None, progress: Progress = lambda done, total: None
) -> Dataset:
    """Read `run.data`, all sources one after the other, in the shares of `data_weights` if there are any.

    With `lenient`, broken rows and a dataset without a usable row are returned instead of raised: a report on
    a dataset lists every fault, a run must not start on one.

    Args:
        run: what to read, and how.
        lenient: return faults instead of raising them.
        stopping: called about ten times a second; raises to interrupt.
        progress: gets bytes read and bytes in all, as often; 0 in all where nobody knows (a hub).

    Raises:
        BadRow: a row that cannot be used, unless `skip_bad_rows`: row, line, field, and what to do.
        ConfigError: `data_weights` do not fit the sources.
        DataError: something named is not there or cannot be read, no format fits, or no row is usable.
        FetchError: the hub could not be reached.
        SpaceError: the rows are too many to hold and there is no room on the disk for them.
    """
    weights = mixture.weights_of(run)
    found = [sources.find(name) for name in run.data]
    reading = _Reading(run, Tape(_size(found), stopping, progress), lenient=lenient, mixed=bool(weights))
    for one in found:
        reading.read(one)
        reading.notes += _about(one, run)
    return reading.result(run.data, weights)


def load_eval(
    run: RunConfig, *, lenient: bool = False, stopping: Stopping = lambda: None, progress: Progress = lambda done, total: None
) -> Dataset | None:
    """Read the rows to measure on the same way: `run.eval_data`, else the valid files of the folders in `run.data`; None if there are none.

    Raises:
        BadRow, DataError, FetchError, SpaceError: as `load`.
    """
    if run.eval_data:
        found = [sources.find_eval(run.eval_data)]
    else:
        folders = [one for name in run.data if (one := sources.find(name)).eval_pieces]
        found = [replace(one, pieces=one.eval_pieces) for one in folders]
    if not found:
        return None
    reading = _Reading(run, Tape(_size(found), stopping, progress), lenient=lenient)
    for one in found:
        reading.read(one)
    return reading.result(tuple(one.name for one in found), ())


class _Reading:
    """Reads sources one after the other and gathers what they hold."""

    def __init__(self, run: RunConfig, tape: Tape, *, lenient: bool, mixed: bool = False) -> None:
        self.run, self.tape, self.lenient = run, tape, lenient
        self.stop = not (lenient or run.skip_bad_rows)
        self.rows, self.refused = row_store.rows(), row_store.refusals()
        self.keys = array("Q") if mixed else None
        self.characters = array("Q")
        self.numbers = itertools.count(1)
        self.begins: list[int] = []
        self.shown: list[str] = []
        self.sources: list[Source] = []
        self.whys: list[str] = []
        self.notes: list[str] = []

    def read(self, found: sources.Found) -> None:
        """Read one source to its end."""
        before = len(self.rows)
        raws = self._raws(found)
        ahead = list(itertools.islice(raws, _LOOKED_AT))
        form, why = self._form(found, [fields for _, raw in ahead if isinstance(fields := raw.fields, Mapping)])
        if form is None:
            for number, raw in itertools.chain(ahead, raws):
                self._refuse(
                    refusal(number, raw.line, raw.fields) if isinstance(raw.fields, BadRow) else Refusal(number, raw.line, "", why)
                )
        else:
            for row in form.read_all(self._usable(itertools.chain(ahead, raws)), self.tape.look):
                self._take(row)
        self.whys.append(why)
        self.notes += found.notes
        self.sources.append(Source(found.name, form.name if form else "", len(self.rows) - before))

    def result(self, names: Sequence[str], weights: Sequence[float]) -> Dataset:
        """Return what was read; `weights` empty: all of it."""
        self.tape.end()
        rows, refused = self.rows.done(), self.refused.done()
        if not rows and not self.lenient:
            raise _nothing(names, refused)
        if weights:
            rows = self._mixed(rows, weights)
        return Dataset(
            rows=rows,
            refused=refused,
            format=", ".join(dict.fromkeys(source.format for source in self.sources if source.format)),
            why="; ".join(dict.fromkeys(self.whys)),
            sources=tuple(self.sources),
            notes=tuple(dict.fromkeys(self.notes)),
            longest=max(self.characters, default=0),
        )

    def _raws(self, found: sources.Found) -> Iterator[tuple[int, Raw]]:
        for piece in found.pieces:
            first = True
            for raw in piece.open(self.tape, self.notes.append):
                number = next(self.numbers)
                if first:
                    self.begins.append(number)
                    self.shown.append(piece.shown)
                    first = False
                yield number, _converted(raw, found)

    def _form(self, found: sources.Found, look: Sequence[Mapping[str, object]]) -> tuple[Mapped | None, str]:
        wanted = found.format if found.format and self.run.data_format == "auto" else self.run.data_format
        if not look:
            return None, f"{one_line(found.name)} holds no row that can be read"
        try:
            return detect(look, wanted, self.run.data_columns)
        except DataError as error:
            if not self.lenient:
                raise DataError(error.problem.message, hint=error.problem.hint, where=one_line(found.name)) from None
            return None, error.problem.message

    def _usable(self, raws: Iterable[tuple[int, Raw]]) -> Iterator[Placed]:
        """Yield the rows that can be read at all; the others are refused on the way."""
        for number, raw in raws:
            if isinstance(raw.fields, BadRow):
                self._refuse(refusal(number, raw.line, raw.fields))
            else:
                yield number, raw.line, raw.fields

    def _take(self, row: Row | Refusal) -> None:
        if isinstance(row, Refusal):
            self._refuse(row)
            return
        packed = self.rows.add(row)
        self.characters.append(sum([len(turn.content) for turn in row.chat.turns]))
        if self.keys is not None:
            self.keys.append(mixture.draw_key(row_store.chat_part(packed), self.run.seed))

    def _refuse(self, one: Refusal) -> None:
        """Remember a refused row, or stop at it; its file is told by its number, since some formats tell late."""
        where = self.shown[bisect_right(self.begins, one.row) - 1]
        if self.stop:
            raise _stopping(one, where)
        self.refused.add(replace(one, source=where))

    def _mixed(self, rows: Sequence[Row], weights: Sequence[float]) -> Sequence[Row]:
        if self.keys is None:
            raise AssertionError("rows are mixed by keys that were gathered with them")
        counts = [source.rows for source in self.sources]
        used = mixture.quotas(counts, weights)
        places = array("Q")
        for first, held, wanted in zip(itertools.accumulate(counts, initial=0), counts, used, strict=False):
            places += mixture.draw(self.keys, first, first + held, wanted)
        told = [
            f"{count(some)} of {count(all_)} rows of {one_line(one.name)}"
            for some, all_, one in zip(used, counts, self.sources, strict=True)
        ]
        self.notes.append(f"data_weights: {', '.join(told)} are used, drawn by seed; no row is used twice.")
        self.sources = [replace(one, rows=some) for one, some in zip(self.sources, used, strict=True)]
        self.characters = array("Q", map(self.characters.__getitem__, places))
        return row_store.picked(rows, places)


def _size(found: Sequence[sources.Found]) -> int:
    return sum(piece.size for one in found for piece in one.pieces)


def _converted(raw: Raw, found: sources.Found) -> Raw:
    if found.convert is None or isinstance(raw.fields, BadRow):
        return raw
    try:
        return Raw(raw.line, found.convert(raw.fields))
    except BadRow as error:
        return Raw(raw.line, error)


def _about(found: sources.Found, run: RunConfig) -> list[str]:
    """Return the sentences about the files of a folder that are not trained on."""
    shown, notes = one_line(found.name), []
    if found.eval_names:
        names = _file_names(found.eval_names)
        if run.eval_data:
            notes.append(f"{shown}: {names} is not used, since eval_data names what is measured on.")
        else:
            notes.append(f"{shown}: {names} is measured on, so nothing is held out of the rows to train.")
    if found.unused:
        notes.append(f"{shown}: {_file_names(found.unused)} is not used.")
    return notes


def _file_names(paths: Sequence[str]) -> str:
    first = one_line(Path(paths[0]).name, limit=80)
    return f"{first} and {len(paths) - 1} more" if len(paths) > 1 else first


def _stopping(refused: Refusal, name: str) -> BadRow:
    line = f", line {refused.line}" if refused.line else ""
    field = f"field {one_line(refused.field, limit=80)}: " if refused.field else ""
    where = f"{one_line(name)}, row {refused.row}{line}"
    return BadRow(field + refused.reason, row=refused.row, field=refused.field, hint=_SKIP, where=where)


def _nothing(names: Sequence[str], refused: Sequence[Refusal]) -> DataError:
    where = ", ".join(one_line(name) for name in names)
    if not refused:
        return DataError("there is no row in it", hint="one JSON object a line is expected", where=where)
    first = refused[0]
    field = f", field {one_line(first.field, limit=80)}" if first.field else ""
    fault = f"none of its {len(refused)} rows can be used; the first: row {first.row}{field}: {first.reason}"
    return DataError(fault, hint="qlora-tui data PATH lists them all", where=where)
