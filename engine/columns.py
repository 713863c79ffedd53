"""The names of data: formats that `data_format` chooses from, and fields that `data_columns` maps columns of a file to.

Below everything that reads data, so that a wrong name is told before a file is opened.
"""

from __future__ import annotations

from collections.abc import Sequence

DATA_FORMATS = (
    "auto",
    "messages",
    "sharegpt",
    "chained",
    "alpaca",
    "prompt-completion",
    "question-answer",
    "segments",
    "tokenized",
    "text",
)
INNER_FIELDS = ("role", "content")
"""Fields of each turn; a column for them is looked for inside the lists of turns."""
DATA_FIELDS = (
    "messages",
    "conversations",
    *INNER_FIELDS,
    "tools",
    "system",
    "instruction",
    "input",
    "output",
    "history",
    "prompt",
    "completion",
    "question",
    "answer",
    "context",
    "id",
    "parent_id",
    "source_id",
    "segments",
    "text",
    "input_ids",
    "labels",
    "attention_mask",
)


def split(entry: str) -> tuple[str, str]:
    """Return field and column of `FIELD=COLUMN`; spaces around either do not count, and a column may hold `=` itself.

    >>> split("prompt = my question")
    ('prompt', 'my question')
    """
    field, _, column = entry.partition("=")
    return field.strip().casefold().replace("-", "_"), column.strip()


def fault(entries: Sequence[str]) -> str:
    """Return what is wrong with `data_columns`, as a sentence; empty if nothing is."""
    seen: dict[str, str] = {}
    columns: dict[str, str] = {}
    for entry in entries:
        field, column = split(entry)
        if "=" not in entry or not field or not column:
            return f"{entry!r} is not FIELD=COLUMN, such as prompt=question"
        if field not in DATA_FIELDS:
            return f"{field!r} is no field; fields are {', '.join(DATA_FIELDS)}"
        if field in seen:
            return f"{field} is given two columns, {seen[field]!r} and {column!r}"
        if column in columns:
            return f"the column {column!r} is given to two fields, {columns[column]} and {field}"
        seen[field], columns[column] = column, field
    return ""
