"""The rows that an export is proved on: the run's own hold-out, or rows that every Python has, where that is gone."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from qlora_tui.engine import data
from qlora_tui.engine.data import Chat, Tokenizer, TokenRow, lengths_of, numbers_of
from qlora_tui.engine.errors import EngineError, Stopped
from qlora_tui.engine.export.target import Look, Rows, Source
from qlora_tui.engine.spec import DEMO_DATA, RunConfig

MOST_ROWS = 32
"""More rows cost minutes on a processor and show no fault that these do not."""


def rows_of(source: Source, tokenizer: Tokenizer, look: Look) -> Rows:
    """Return up to 32 rows of the hold-out, short and long ones, with the chats they were made from.

    Data that are gone, or of which nothing was held out, are replaced by rows of Python's documentation: whether two files
    hold the same model shows on any text.
    """
    try:
        found = _held_out(source.run, tokenizer, look)
    except Stopped:
        raise
    except EngineError:
        found = None
    name = "held-out rows"
    if found is None:
        name = "rows of Python's documentation"
        found = _held_out(_documentation(source.run), tokenizer, look)
    if found is None:
        raise AssertionError("the documentation of Python has rows to hold out")
    tokens, chats = found
    return Rows(tokens, chats, name, stop_of(tokens))


def stop_of(rows: Sequence[TokenRow]) -> int | None:
    """Return the token that most rows train last, if it ends more than half of them."""
    ends = Counter(row.input_ids[max(place for place, trained in enumerate(row.trained) if trained)] for row in rows)
    token, times = ends.most_common(1)[0]
    return token if times > len(rows) / 2 else None


def _held_out(run: RunConfig, tokenizer: Tokenizer, look: Look) -> tuple[list[TokenRow], list[Chat]] | None:
    dataset = data.load(run, lenient=True, stopping=look)
    measured = data.load_eval(run, lenient=True, stopping=look)
    rows = data.prepare(run, dataset, tokenizer, eval_dataset=measured, stopping=look).holdout
    if not len(rows):
        return None
    order = sorted(range(len(rows)), key=lengths_of(rows).__getitem__)
    chosen = sorted({order[place * (len(order) - 1) // max(1, MOST_ROWS - 1)] for place in range(MOST_ROWS)})
    numbers = {numbers_of(rows)[place] for place in chosen}
    chats = {row.number: row.chat for row in (measured or dataset).rows if row.number in numbers}
    return [rows[place] for place in chosen], [chats[number] for number in sorted(numbers) if number in chats]


def _documentation(run: RunConfig) -> RunConfig:
    usual = RunConfig()
    return dataclasses.replace(
        run,
        data=(DEMO_DATA,),
        data_format=usual.data_format,
        data_columns=(),
        data_weights=(),
        eval_data="",
        val_set_size=float(MOST_ROWS),
        max_samples=4 * MOST_ROWS,
        filter_duplicates="off",
        too_long="drop",
    )
