"""What a data source holds, as the wizard shows it: put together once from the rows, and again once they were counted."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from qlora_tui.engine.spec import RunConfig
from qlora_tui.tui.lengths import Lengths, guess

if TYPE_CHECKING:
    from qlora_tui.engine.data import Dataset, Row

_NO_FORMAT = "no known format fits"
_COLUMNS = "columns of other names are told on the command line, such as --set data_columns=prompt=ASK,completion=REPLY"
_SHOWN_ROWS = 6
_SHOWN_FAULTS = 20
_COMPARED_ROWS = 20_000


@dataclass(frozen=True, slots=True)
class DataLook:
    """What a data source holds; `problem` is set when it cannot be used at all."""

    names: tuple[str, ...]
    format: str = ""
    why: str = ""
    rows: int = 0
    tokens: int = 0
    lengths: Lengths = field(default_factory=Lengths)
    samples: tuple[tuple[str, str], ...] = ()
    faults: tuple[str, ...] = ()
    refused: int = 0
    problem: str = ""
    hint: str = ""
    histogram: tuple[tuple[int, int, int], ...] = ()
    """Bins of lengths: from, to, rows."""
    copies: tuple[int, int, int] = (0, 0, 0)
    """Exact copies of earlier rows, rows that are nearly so, and among how many rows was looked."""
    measured_on: int | None = None
    """Rows that the data bring to be measured on; None: they are held out of the rows to train."""
    repeated: tuple[tuple[float, str, str], ...] | None = None
    """Passages that many rows share: share of the rows, role, text; None until they have been looked for."""

    leaks: int = 0
    """Of the rows to be measured on, those that are also trained on, or nearly."""

    @property
    def unwritable(self) -> bool:
        """Say whether no row that was looked at can be written out for the model."""
        return self.lengths.unwritten == 1


def look_of(run: RunConfig, found: Dataset, apart: Dataset | None, stopping: Callable[[], None]) -> DataLook:
    """Return what `found` holds, with lengths guessed from characters; `apart` are rows that come to be measured on."""
    from qlora_tui.engine import data

    lengths = guess(found.rows)
    samples = tuple((turn.role, turn.content[:400]) for row in found.rows[:_SHOWN_ROWS] for turn in row.chat.turns[:4])
    refused = [item for item in found.refused if found.rows or item.reason != found.why]  # what is wrong with all is told once
    faults = tuple(_fault(item.row, item.line, item.field, item.reason) for item in refused[:_SHOWN_FAULTS])
    copies = data.count_copies(itertools.islice(found.rows, _COMPARED_ROWS), stopping)
    trained, measured = (itertools.islice(each.rows if each else (), _COMPARED_ROWS) for each in (found, apart))
    look = DataLook(
        names=run.data,
        format=found.format,
        why=found.why,
        rows=len(found.rows),
        samples=samples,
        faults=faults,
        refused=len(refused),
        problem="" if found.rows else f"no row of it can be used{': ' if found.why else ''}{found.why}",
        hint=_COLUMNS if not found.rows and found.why.startswith(_NO_FORMAT) else "",
        copies=(copies["exact"], copies["near"], min(len(found.rows), _COMPARED_ROWS)),
        measured_on=len(apart.rows) if apart else None,
        leaks=data.count_leaks(trained, measured, stopping) if apart else 0,
    )
    return with_lengths(look, lengths)


def with_lengths(look: DataLook, lengths: Lengths) -> DataLook:
    """Return `look` with other lengths, such as those that a tokenizer counted, and what follows from them."""
    from qlora_tui.engine import data

    bins = tuple((each["low"], each["high"], each["rows"]) for each in data.histogram(lengths.tokens))
    total = round(sum(lengths.tokens) / len(lengths.tokens) * look.rows) if lengths.tokens else 0
    return replace(look, lengths=lengths, tokens=total, histogram=bins)


def passages(rows: Sequence[Row], stopping: Callable[[], None]) -> tuple[tuple[float, str, str], ...]:
    """Return the passages that many rows share, as share of the rows, role and text; slow, `stopping` raises to interrupt."""
    from qlora_tui.engine import data

    return tuple((each["share"], each["role"], each["text"]) for each in data.boilerplate(rows, stopping))


def _fault(row: int, line: int | None, field_name: str, reason: str) -> str:
    where = f"row {row}" + (f" (line {line})" if line and line != row else "") + (f", {field_name}" if field_name else "")
    return f"{where}: {reason}"
