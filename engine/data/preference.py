"""Rows that compare answers: not for this kind of training, and told so with what can be done instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qlora_tui.engine.data.chat import fields, read_flag
from qlora_tui.engine.data.turns import as_list, looks_like_turns
from qlora_tui.engine.errors import BadRow, DataError

_ANSWER_OF = {"prompt": "completion", "instruction": "output", "question": "answer", "query": "answer", "problem": "answer"}
MOST = 0.5
"""From this share of the rows on, a shape is what the source is about."""


def refused_shape(rows: Sequence[Mapping[str, object]]) -> DataError | None:
    """Return why these rows cannot be trained on, if most of them are pairs, rated answers, or single turns of a tree."""
    plain = [fields(row) for row in rows]
    if _most(["chosen" in row and "rejected" in row and not _answered(row) for row in plain]):
        sample = next(row for row in plain if "chosen" in row)
        fault = "these are preference rows (chosen, rejected): training on answers would have to ignore what was rejected"
        return DataError(fault, hint=f"to train on the chosen answers alone: {_use(sample)}")
    if _most([{"prompt", "completion"} <= row.keys() and (_is_flag(row.get("label")) or "kto_tag" in row) for row in plain]):
        fault = "these are rated answers (prompt, completion, label): the bad ones must not be learned"
        return DataError(fault, hint="keep the rows with a good label and remove the column label")
    if _most([{"text", "role", "parent_id"} <= row.keys() for row in plain]):
        fault = "these are single turns (role, text, parent_id), one a row"
        return DataError(fault, hint='join each chat into one row {"messages": [...]}')
    return None


def _answered(row: Mapping[str, object]) -> bool:
    """Say whether the row has a chat that ends with an answer beside the pair: that is what people train on, and then it is."""
    turns = next((as_list(row[name]) for name in ("messages", "conversations") if looks_like_turns(row.get(name))), ())
    last = fields(turns[-1]) if turns and isinstance(turns[-1], Mapping) else {}
    return str(last.get("role", last.get("from"))).strip().casefold() in ("assistant", "gpt", "chatgpt", "model")


def _use(row: Mapping[str, object]) -> str:
    chosen = row["chosen"]
    if looks_like_turns(row.get("conversations")) or looks_like_turns(row.get("messages")):
        return "add each chosen answer to its chat as the last turn"
    if not isinstance(chosen, str):
        whole = looks_like_turns(chosen) and (not row.get("prompt") or _begins_with_question(chosen))
        return "--set data_columns=messages=chosen" if whole else "--set data_columns=completion=chosen"
    asked = next((name for name in _ANSWER_OF if name in row), "")
    return f"--set data_columns={_ANSWER_OF[asked]}=chosen" if asked else 'write them as {"prompt": ..., "completion": ...}'


def _begins_with_question(turns: object) -> bool:
    first = turns[0] if isinstance(turns, (list, tuple)) else None
    return isinstance(first, Mapping) and str(fields(first).get("role")).strip().casefold() != "assistant"


def _is_flag(value: object) -> bool:
    try:
        return isinstance(value, (bool, str, int)) and read_flag(value, "label") is not None
    except BadRow:
        return False


def _most(found: Sequence[bool]) -> bool:
    return bool(found) and sum(found) >= MOST * len(found)
