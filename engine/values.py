"""The values of settings: their types, and how they are read from what a person types or a TOML file holds.

A value of another type is refused with the key, the value and the type by name; nothing is guessed.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass
from typing import Literal, get_args

from qlora_tui.engine.errors import ConfigError
from qlora_tui.engine.units import seconds

Kind = Literal["text", "integer", "number", "flag", "list", "duration", "layers"]
Value = str | int | float | bool | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Key:
    """One setting: its type, bounds and the sentence that explains it everywhere."""

    name: str
    group: str
    kind: Kind
    default: Value
    help: str
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf


def read_text(key: Key, text: str, *, where: str = "") -> Value:
    """Read what a person typed for `key` as the key's type.

    Raises:
        ConfigError: the text is not of that type; the key, the text and the type are named.
    """
    raw = text.strip()
    try:
        match key.kind:
            case "integer":
                return int(raw)
            case "number":
                return _finite(float(raw))
            case "duration":
                return seconds(raw)
            case "flag":
                return {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False}[raw.lower()]
            case "list":
                return _list(raw)
            case "text":
                return raw
            case "layers":
                return _layers(raw)
    except (ValueError, KeyError):
        raise _wrong_type(key, text, where) from None


def read_value(key: Key, value: object, *, where: str = "") -> Value:
    """Read a TOML value for `key`; a number written as text is refused, not guessed.

    Raises:
        ConfigError: the value is of another type.
    """
    match key.kind, value:
        case "integer", int() if not isinstance(value, bool):
            return value
        case "number", int() | float() if not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        case "duration", int() | float() if not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        case (("duration" | "list"), str()):
            return read_text(key, value, where=where) if key.kind == "duration" else (value,)
        case "flag", bool():
            return value
        case "layers", bool() | int() | str():
            try:
                return _layers(str(value).lower())
            except ValueError:
                raise _wrong_type(key, value, where) from None
        case "text", str():
            return value
        case "list", list() | tuple() if all(isinstance(part, str) for part in value):
            return tuple(value)
    raise _wrong_type(key, value, where)


def _list(text: str) -> tuple[str, ...]:
    """Read texts with commas between them; one with a comma inside has to be quoted, as JSON does it: ["a, b", "c"]."""
    with contextlib.suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, list) and all(isinstance(part, str) for part in found):
            return tuple(found)
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    return tuple(part.strip(" \"'") for part in inner.split(",") if part.strip(" \"'"))


def _layers(text: str) -> str:
    """Read `auto`, `true`, `false` or a number of layers; a bare 0 is none of them."""
    word = {"yes": "true", "on": "true", "no": "false", "off": "false", "0": "false"}.get(text.lower(), text.lower())
    if word in ("auto", "true", "false"):
        return word
    if not word.isdecimal():
        raise ValueError(text)
    return str(int(word))


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise ValueError(number)
    return number


_KIND_WORDS: dict[Kind, str] = {
    "text": "text",
    "integer": "a whole number",
    "number": "a number such as 2e-4",
    "flag": "true or false",
    "list": "a list of texts",
    "duration": "a duration such as 90m or 2h",
    "layers": "auto, true, false or a number of layers",
}
if set(_KIND_WORDS) != set(get_args(Kind)):
    raise AssertionError("a kind of key has no words")


def _wrong_type(key: Key, value: object, where: str) -> ConfigError:
    hint = f"choose from {', '.join(key.choices)}" if key.choices else f"its default is {key.default!r}"
    return ConfigError(f"{key.name} = {value!r} is not {_KIND_WORDS[key.kind]}", hint=hint, where=where)
