"""Whether the text a template wrote for an answer holds the whole answer: its words, its thought, its tool calls."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from qlora_tui.engine.data.chat import Turn
from qlora_tui.engine.text import one_line

OPEN, CLOSE = "<think>", "</think>"


_CHANGED = "the chat template changes the text of a turn, so what to train cannot be told apart"


def missing_part(turn: Turn, written: str) -> tuple[str, bool]:
    """Say what of an answer is missing in the text a template wrote for it (nothing: an empty text), and whether its thought is."""
    thought, answer = _parted(turn)
    body = written.strip()
    head, found, rest = body.rpartition(answer) if answer else ("", "", body)
    if answer and not found:
        return "the chat template leaves out the text beside a tool call" if turn.tool_calls else _CHANGED, False
    kept = bool(thought) and thought in (head if answer else rest)
    if turn.tool_calls:
        fault = next((f"the chat template leaves out {part}" for part in _missing(turn, head + rest)), "")
    else:
        extra = "" if kept else "".join(head.split())
        fault = _CHANGED if rest or extra not in ("", OPEN + CLOSE) else ""
    return fault, bool(thought) and not kept


def _parted(turn: Turn) -> tuple[str, str]:
    """Return the thought and the answer of a turn, trimmed."""
    if turn.thoughts:
        return turn.thoughts.strip(), turn.content.strip()
    thought, found, answer = turn.content.rpartition(CLOSE)
    return (thought.partition(OPEN)[2] or thought).strip() if found else "", answer.strip()


def _missing(turn: Turn, written: str) -> Iterator[str]:
    """Name each tool call, or part of one, that is not in the text the template wrote."""
    for call in turn.tool_calls:
        function = call.get("function")
        called: Mapping[str, object] = function if isinstance(function, Mapping) else call
        if str(called.get("name")) not in written:
            yield f"the tool call {one_line(str(called.get('name')), limit=60)}"
        for leaf in _leaves(called.get("arguments")):
            if not any(spelled in written for spelled in (leaf, json.dumps(leaf, ensure_ascii=False)[1:-1], json.dumps(leaf)[1:-1])):
                yield f"the argument {one_line(leaf, limit=60)} of a tool call"


def _leaves(value: object) -> Iterator[str]:
    """Yield every key and every text or number in the arguments of a call."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value
    elif value is not None and not isinstance(value, bool):
        yield json.dumps(value)
