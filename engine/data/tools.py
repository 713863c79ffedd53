"""Tools and calls of them, in the one shape that chat templates take: `{"type": "function", "function": {...}}`.

Files spell them in several ways: arguments as an object or as JSON text, definitions with or without their wrapper,
a whole list as one text. Numbers in them become numbers again, since a template writes them as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from qlora_tui.engine.data.chat import kind_of, read_text, read_words
from qlora_tui.engine.data.json_rows import parse
from qlora_tui.engine.errors import BadRow
from qlora_tui.engine.text import one_line

Wrapped = Mapping[str, object]


def read_tools(row: Mapping[str, object]) -> tuple[Wrapped, ...]:
    """Return the tools a row offers, from `tools` or the older `functions`.

    Raises:
        BadRow: a definition has no name, or the list is none.
    """
    name = "tools" if row.get("tools") else "functions"
    value = _parsed(row.get(name), name)
    if not value:
        return ()
    if not isinstance(value, (list, tuple)):
        raise BadRow(f"a list of tools was expected, found {kind_of(value)}", field=name)
    return tuple(_definition(_parsed(item, f"{name}[{index}]"), f"{name}[{index}]") for index, item in enumerate(value))


def read_calls(turn: Mapping[str, object], field: str) -> tuple[Wrapped, ...]:
    """Return the calls of an answer, from `tool_calls` or the older `function_call`.

    Raises:
        BadRow: a call has no name, or arguments that are no JSON object.
    """
    if turn.get("function_call"):
        return (_call(turn["function_call"], f"{field}.function_call"),)
    where = f"{field}.tool_calls"
    value = _parsed(turn.get("tool_calls"), where)
    if not value:
        return ()
    if not isinstance(value, (list, tuple)):
        raise BadRow(f"a list of calls was expected, found {kind_of(value)}", field=where)
    return tuple(_call(item, f"{where}[{index}]") for index, item in enumerate(value))


def read_call_text(value: object, field: str) -> tuple[Wrapped, ...]:
    """Return the calls of a turn whose whole content is a call, or a list of calls, written as JSON.

    Raises:
        BadRow: it is no such thing.
    """
    found = _parsed(read_words(value, field) if isinstance(value, str) or value is None else value, field)
    calls = found if isinstance(found, (list, tuple)) else [found]
    if not calls:
        raise BadRow("the list of calls is empty", field=field)
    return tuple(_call(item, field) for item in calls)


def plain_json(value: object, field: str) -> object:
    """Return a value as JSON has it: numbers as numbers, lists and objects of their own.

    Raises:
        BadRow: something in it is no JSON value.
    """
    if isinstance(value, Mapping):
        return {read_text(key, field): plain_json(item, field) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item, field) for item in value]
    if isinstance(value, str):
        return read_text(value, field)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return float(value)  # one that remembers how it was written is not what a template expects
    raise BadRow(f"{one_line(value, limit=40)!r} is no JSON value", field=field)


def _parsed(value: object, field: str) -> object:
    """Return what a text of JSON holds; anything else as it is."""
    if not isinstance(value, str) or not value.strip():
        return None if isinstance(value, str) else value
    try:
        return parse(value)
    except (ValueError, RecursionError):
        raise BadRow(f"{one_line(value, limit=60)!r} is not JSON", field=field) from None


def _definition(item: object, field: str) -> Wrapped:
    if not isinstance(item, Mapping):
        raise BadRow(f"a tool must be an object, found {kind_of(item)}", field=field)
    inner = item.get("function") if isinstance(item.get("function"), Mapping) else item
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not str(inner["name"]).strip():
        raise BadRow("the tool has no name", field=field)
    _refuse_kind(item, field)
    function = inner if inner is not item else {key: value for key, value in item.items() if key != "type"}
    return {"type": "function", "function": plain_json(function, field)}


def _call(item: object, field: str) -> Wrapped:
    item = _parsed(item, field)
    if not isinstance(item, Mapping):
        raise BadRow(f"a call must be an object with name and arguments, found {kind_of(item)}", field=field)
    inner = item.get("function")
    inner = inner if isinstance(inner, Mapping) else item
    name = inner.get("name")
    if not isinstance(name, str) or not name.strip():
        raise BadRow("the call has no name", field=field)
    _refuse_kind(item, field)
    given = _parsed(inner.get("arguments", inner.get("parameters")), f"{field}.arguments")
    if given is not None and not isinstance(given, Mapping):
        raise BadRow(f"arguments must be a JSON object, found {kind_of(given)}", field=f"{field}.arguments")
    call = {"type": "function", "function": {"name": read_text(name, field), "arguments": plain_json(given or {}, f"{field}.arguments")}}
    return call if item.get("id") is None else {**call, "id": read_text(item["id"], f"{field}.id")}


def _refuse_kind(item: Mapping[str, object], field: str) -> None:
    if item.get("type") not in (None, "function", "object"):
        raise BadRow(f"a tool of type {one_line(item['type'], limit=40)!r} is not known; only function is", field=field)
