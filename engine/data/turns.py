"""Lists of turns, whatever they are called: `{role, content}` and `{from, value}`, with tools, names and train flags.

Shared by every format that holds such lists. Nothing in a turn is passed over: half a chat is a wrong chat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qlora_tui.engine.data.chat import Role, Turn, fields, read_flag, read_role, read_text, read_words
from qlora_tui.engine.data.json_rows import parse
from qlora_tui.engine.data.tools import read_call_text, read_calls
from qlora_tui.engine.errors import BadRow

_UNREAD = ("audio", "image", "images", "video", "videos", "refusal")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_BARE = frozenset(("role", "from", "content", "value"))
_TRAIN_FLAGS = ("weight", "train", "training")
_PART_FLAGS = ("train", "weight")
_SPANS = ("train_detail", "training_detail")


def looks_like_turns(value: object) -> bool:
    """Say whether `value` is a list of objects that say who speaks, or such a list written as JSON text."""
    items = as_list(value)
    return bool(items) and all(isinstance(item, Mapping) and not fields(item).keys().isdisjoint(("role", "from")) for item in items)


def as_list(value: object) -> Sequence[object]:
    """Return `value` as a list: itself, or the list that a text of JSON holds (a CSV file has no other way); empty if it is none."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse(value)
        except (ValueError, RecursionError):
            return ()
    return value if isinstance(value, (list, tuple)) else ()


def read_turns(value: object, field: str) -> list[Turn]:
    """Read a list of messages; nothing in it is passed over in silence.

    Raises:
        BadRow: with the path of the message at fault, such as `messages[2].content`.
    """
    items = as_list(value)
    if not items and isinstance(value, str) and value.lstrip().startswith("[{'"):
        raise BadRow("a list of messages in Python's spelling, which is no JSON", field=field, hint="write it with json.dumps")
    if not items:
        empty = isinstance(value, (list, tuple)) or str(value).split() in (["[]"], ["[", "]"])
        raise BadRow("the list of messages is empty" if empty else "a list of messages was expected", field=field)
    return [_turn(item, f"{field}[{index}]") for index, item in enumerate(items)]


def with_system(system: str, turns: list[Turn], field: str) -> list[Turn]:
    """Put a row's own system text before its turns.

    Raises:
        BadRow: the turns begin with another one.
    """
    if not system.strip():
        return turns
    if turns[0].role != "system":
        return [Turn("system", system), *turns]
    if turns[0].content.strip() not in ("", system.strip()):
        raise BadRow("the row has two system texts: one of its own and one in its first turn", field=field, hint="keep one of them")
    return [Turn("system", system), *turns[1:]]


def read_history(value: object, field: str = "history") -> list[Turn]:
    """Read earlier `[question, answer]` pairs.

    Raises:
        BadRow: with the pair at fault.
    """
    if not value:
        return []
    pairs = as_list(value)
    if not pairs and not isinstance(value, str):
        raise BadRow("a list of [question, answer] pairs was expected", field=field)
    if not pairs and str(value).split() not in (["[]"], ["[", "]"]):
        raise BadRow("a list of [question, answer] pairs was expected", field=field)
    turns = []
    for index, pair in enumerate(pairs):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise BadRow("a pair of question and answer was expected", field=f"{field}[{index}]")
        question, answer = read_words(pair[0], f"{field}[{index}][0]"), read_words(pair[1], f"{field}[{index}][1]")
        turns += [Turn("user", question), Turn("assistant", answer)]
    return turns


def _turn(item: object, field: str) -> Turn:
    if not isinstance(item, Mapping):
        raise BadRow("a message must be an object with role and content", field=field)
    plain = fields(item)
    bare = plain.keys() <= _BARE  # as nearly all are
    unread = None if bare else next((name for name in _UNREAD if plain.get(name)), None)
    if unread:
        raise BadRow(f"{unread} cannot be trained yet", field=f"{field}.{unread}", hint="remove it or the row")
    if not bare and (spans := next((name for name in _SPANS if plain.get(name)), None)):
        told = "a message has train flags for parts of its text"
        raise BadRow(told, field=f"{field}.{spans}", hint="flags of whole turns, or segments, can be told")
    role_key = "role" if plain.get("role") is not None or "from" not in plain else "from"
    text_key = "content" if plain.get("content") is not None or "value" not in plain else "value"
    if isinstance(plain.get(text_key), list):
        plain = _parts_agreed(plain, text_key, field)
        bare = plain.keys() <= _BARE
    written = str(plain.get(role_key)).strip().casefold()
    if written in ("function_call", "tool_call"):
        calls, role, text = read_call_text(plain.get(text_key), f"{field}.{text_key}"), "assistant", ""
        return Turn("assistant", text, _trained(plain, "assistant", field), tool_calls=calls)
    role = read_role(plain.get(role_key), f"{field}.{role_key}")
    if bare:
        return Turn(role, _content(plain.get(text_key), role, f"{field}.{text_key}", calls=False))
    calls = read_calls(plain, field)
    if calls and role != "assistant":
        raise BadRow("only an assistant turn can call a tool", field=f"{field}.tool_calls")
    text = _content(plain.get(text_key), role, f"{field}.{text_key}", calls=bool(calls))
    name, call_id = (_word(plain.get(key), f"{field}.{key}") for key in ("name", "tool_call_id"))
    thoughts = next((_word(plain[key], f"{field}.{key}") for key in _THOUGHTS if plain.get(key)), "")
    if thoughts and role != "assistant":
        raise BadRow("only an assistant turn can have thoughts", field=field)
    return Turn(role, text, _trained(plain, role, field), name, calls, call_id, thoughts)


def _parts_agreed(turn: Mapping[str, object], key: str, field: str) -> Mapping[str, object]:
    """Return the turn with the train flag that all parts of its content have as its own; where they differ, it stays and is refused."""
    parts = turn[key]
    if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
        return turn
    flags = [{read_flag(part.get(name), f"{field}.{key}") for name in _PART_FLAGS} - {None} for part in parts]
    if not flags or len(flags[0]) != 1 or any(each != flags[0] for each in flags):
        return turn
    (flag,) = flags[0]
    bare = [{name: value for name, value in part.items() if name not in _PART_FLAGS} for part in parts]
    return {**turn, key: bare, **({"train": flag} if not flag or turn.get("train") is None else {})}


def _content(value: object, role: Role, field: str, *, calls: bool) -> str:
    if calls and value is None:
        return ""
    if calls or role in ("system", "tool"):
        return read_text(value, field)
    return read_words(value, field)


def _word(value: object, field: str) -> str:
    return "" if value is None else read_text(value, field)


def _trained(turn: Mapping[str, object], role: Role, field: str) -> bool:
    flags = {name: read_flag(turn.get(name), f"{field}.{name}") for name in _TRAIN_FLAGS}
    if role != "assistant":
        if flags["train"] or flags["training"]:
            told = f"a {role} turn is marked to be trained; only answers are"
            raise BadRow(told, field=f"{field}.train", hint="segments can train any text")
        return True
    return False not in flags.values()
