"""The part of Go's text/template that templates of chats use, rendered as Ollama does: text, values, if, range, and a few functions.

For the parity gate: it reads a Modelfile as it lies on disk, whoever wrote it. What it does not know it refuses by name.

Source: the documentation of Go's packages text/template and Ollama's page on templates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qlora_tui.engine.errors import ModelError
from qlora_tui.engine.text import one_line

_ACTION = re.compile(r"\{\{(-\s)?\s*(.*?)\s*(\s-)?\}\}", re.DOTALL)
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|:=|[()|,]|[^\s()|,"]+')
_COMPARED: Mapping[str, Callable[..., Any]] = {
    "eq": lambda first, *rest: any(first == other for other in rest),
    "ne": lambda first, other: first != other,
    "not": lambda value: not value,
    "len": len,
    "slice": lambda items, start=0, end=None: items[start:end],
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "or": lambda *values: next((value for value in values if value), values[-1]),
}

_Part = str | tuple[str, str]
_Scope = Mapping[str, Any]


def render(template: str, messages: Sequence[Mapping[str, str]]) -> str:
    """Return the prompt that Ollama makes of `messages` by `template`.

    `.System` holds what all system turns say, `.Prompt` the last question.

    Raises:
        ModelError: the template says something that is not known here.
    """
    values = {
        "Messages": [{"Role": message["role"], "Content": message["content"]} for message in messages],
        "System": "\n\n".join(message["content"] for message in messages if message["role"] == "system"),
        "Prompt": next((message["content"] for message in reversed(messages) if message["role"] == "user"), ""),
        "Response": "",
    }
    parts = _parts(template)
    out: list[str] = []
    try:
        _run(parts, 0, {"$": values, ".": values}, out)
    except (KeyError, TypeError, IndexError, StopIteration, ValueError) as error:
        raise ModelError(f"the template cannot be rendered ({one_line(error, limit=80)})", hint="only Ollama itself could tell") from error
    return "".join(out)


def _parts(template: str) -> list[_Part]:
    """Return texts and actions in turn, white space trimmed where an action asks for it."""
    found: list[_Part] = []
    place, trim = 0, False
    for match in _ACTION.finditer(template):
        text = template[place : match.start()]
        text = text.lstrip() if trim else text
        found.append(text.rstrip() if match[1] else text)
        if not match[2].startswith("/*"):
            found.append(("action", match[2]))
        place, trim = match.end(), bool(match[3])
    rest = template[place:]
    found.append(rest.lstrip() if trim else rest)
    return found


def _run(parts: Sequence[_Part], place: int, scope: _Scope, out: list[str] | None) -> tuple[int, str]:
    """Render from `place` until the block ends; with `out` None only find its end. Return where, and the word that ended it."""
    while place < len(parts):
        part = parts[place]
        place += 1
        if isinstance(part, str):
            _put(out, part)
            continue
        word, _, rest = part[1].partition(" ")
        if word in ("end", "else"):
            return place, part[1]
        if word == "if":
            place = _if(parts, place, rest, scope, out)
        elif word == "range":
            place = _range(parts, place, rest, scope, out)
        else:
            _put(out, "" if out is None else str(_value(part[1], scope)))
    return place, ""


def _put(out: list[str] | None, text: str) -> None:
    if out is not None:
        out.append(text)


def _if(parts: Sequence[_Part], place: int, condition: str, scope: _Scope, out: list[str] | None) -> int:
    """Render the branch that holds; return the place behind the block's end."""
    done = out is None
    while True:
        holds = not done and bool(_value(condition, scope))
        place, word = _run(parts, place, scope, out if holds else None)
        done = done or holds
        if word == "end" or not word:
            return place
        condition = word.removeprefix("else").strip().removeprefix("if").strip() or '"else"'


def _range(parts: Sequence[_Part], place: int, clause: str, scope: _Scope, out: list[str] | None) -> int:
    names, assigned, items = clause.partition(":=")
    variables = [name.strip() for name in names.split(",")] if assigned else []
    end, _ = _run(parts, place, scope, None)
    for index, item in enumerate([] if out is None else _value(items if assigned else clause, scope)):
        given = dict(zip(variables, (index, item) if len(variables) == 2 else (item,), strict=False))
        _run(parts, place, {**scope, ".": item, **given}, out)
    return end


def _value(text: str, scope: _Scope) -> Any:
    tokens = _TOKEN.findall(text)
    value, rest = _call(tokens, scope)
    if rest:
        raise ValueError(f"{rest[0]} in {text}")
    return value


def _call(tokens: list[str], scope: _Scope) -> tuple[Any, list[str]]:
    """Return the value of a function with its arguments, or of a single term."""
    if tokens[0] not in _COMPARED:
        return _term(tokens, scope)
    function, rest, values = _COMPARED[tokens[0]], tokens[1:], []
    while rest and rest[0] != ")":
        value, rest = _term(rest, scope)
        values.append(value)
    return function(*values), rest


def _term(tokens: list[str], scope: _Scope) -> tuple[Any, list[str]]:
    head, rest = tokens[0], tokens[1:]
    if head == "(":
        value, rest = _call(rest, scope)
        if rest[0] != ")":
            raise ValueError(f"{rest[0]} where a bracket should close")
        return value, rest[1:]
    if head.startswith('"'):
        return json.loads(head), rest
    if head.lstrip("-").isdecimal():
        return int(head), rest
    name, *fields = head.split(".")
    value = scope[name] if name else scope["."]
    for field in fields:
        value = value[field] if field else value
    return value, rest
