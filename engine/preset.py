"""Presets and config files: TOML in, a run out, and where each value came from.

A file may group keys in tables as it likes, since a key's own name is unique; a key given twice is refused.
`tomllib` keeps no line numbers, so a small scan finds the line of the key that a message is about.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tui.engine import hooks
from qlora_tui.engine.errors import ConfigError, ConfigErrors, Problem
from qlora_tui.engine.places import place
from qlora_tui.engine.spec import GROUPS, KEYS, RunConfig, find_key, from_values, nearest, values_of
from qlora_tui.engine.text import one_line
from qlora_tui.engine.values import Key, Value, read_value

_ABOUT = "preset"  # the table of a preset that is about it and not part of the run
_ABOUT_KEYS = ("title", "why", "card", "goal")


@dataclass(frozen=True, slots=True)
class Goal:
    """What a person wants of a model. `name` is what a preset says as its `goal`."""

    name: str
    title: str
    detail: str


GOALS = (
    Goal("chat", "a chat assistant", "it answers as in your conversations"),
    Goal("qa", "answers about your domain", "your products, papers or rules, as questions with answers"),
    Goal("classify", "classification", "labels, routes, or short answers of one form"),
    Goal("code", "code", "your repository, your libraries, your style"),
    Goal("style", "a style or a voice", "it writes as you do, and knows what it knew"),
    Goal("try", "just try it", "a small real model and real rows, in minutes, on any machine"),
)
"""What people want, in the order in which they are asked."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A ready-made run. `card` names the card it is meant for and must fit; empty: any machine. `goal` is one of `GOALS`.

    `text` is the file as written, with the reason for every value; saved as a file, `--config` reads it.
    """

    name: str
    title: str
    why: str
    card: str
    goal: str
    values: Mapping[str, Value]
    text: str


@dataclass(frozen=True, slots=True)
class _Layer:
    source: str
    values: Mapping[str, Value]


def names() -> tuple[str, ...]:
    """Return the names of all presets that ship with the program."""
    folder = importlib.resources.files("qlora_tui.presets")
    return tuple(sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml")))


@functools.cache
def load(name: str) -> Preset:
    """Return the preset called `name`.

    Raises:
        ConfigError: there is none of that name; the nearest is named.
    """
    if name not in names():
        raise ConfigError(f"no preset called {name!r}", hint=nearest(name, names()) or f"there are {', '.join(names())}", where="--preset")
    text = importlib.resources.files("qlora_tui.presets").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    where = f"{name}.toml"
    about = _parse(text, where).get(_ABOUT, {})
    title, why, card, goal = (str(about.get(key, "")) for key in _ABOUT_KEYS)
    return Preset(name, title, why, card, goal, _read(text, where), text)


def read_file(path: Path) -> dict[str, Value]:
    """Read the keys of a TOML file; all its faults are listed at once, each with its line.

    Raises:
        ConfigError: the file cannot be read, is no TOML, or holds a key or value that cannot be used.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError("no such config file", hint="name a TOML file, or write one with --dry-run", where=one_line(path)) from None
    except IsADirectoryError:
        raise ConfigError("this is a folder, not a config file", hint="name the run.toml in it", where=one_line(path)) from None
    except UnicodeDecodeError:
        raise ConfigError("the file is not UTF-8 text", hint="save it as UTF-8", where=one_line(path)) from None
    except OSError as error:
        raise ConfigError(f"the file cannot be read: {error.strerror or error}", where=one_line(path)) from None
    except ValueError:  # a NUL in its name
        raise ConfigError("this cannot be a file name", where=one_line(path)) from None
    return _read(text, str(path))


def resolve(*, preset: str | None = None, config: Path | None = None, flags: Mapping[str, Value] | None = None) -> RunConfig:
    """Build the run: defaults, then the user's config, the preset, the config file and the flags; later wins.

    Raises:
        ConfigError: one of the files has faults, the preset does not exist, or `notify` would put a secret where runs keep theirs.
    """
    merged: dict[str, Value] = {}
    for layer in _layers(preset, config, flags):
        merged.update(layer.values)
    run = from_values(merged)
    if found := hooks.faults(run.notify):
        raise ConfigErrors(found)
    return run


def origins(*, preset: str | None = None, config: Path | None = None, flags: Mapping[str, Value] | None = None) -> dict[str, str]:
    """Say for every key where its value comes from: `default`, a file, `preset NAME` or `flags`."""
    sources = dict.fromkeys(KEYS, "default")
    for layer in _layers(preset, config, flags):
        sources.update(dict.fromkeys(layer.values, layer.source))
    return sources


def to_toml(run: RunConfig, remarks: Mapping[str, str] | None = None) -> str:
    """Return `run` as a TOML file: every key in its group with its line of help, readable by `read_file`.

    `remarks` adds a line above the keys that it names, such as where a value came from.
    """
    values = values_of(run)
    said = {name: f"# {one_line(remark)}\n" for name, remark in (remarks or {}).items()}
    parts = []
    for group in GROUPS:
        keys = [key for key in KEYS.values() if key.group == group]
        rows = [f"# {key.help}\n{said.get(key.name, '')}{key.name} = {_bare(key, values[key.name])}" for key in keys]
        parts.append(f"[{group}]\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _layers(preset: str | None, config: Path | None, flags: Mapping[str, Value] | None) -> Iterator[_Layer]:
    user = place("config") / "config.toml"
    if user.is_file():
        yield _Layer(str(user), read_file(user))
    if preset:
        yield _Layer(f"preset {preset}", load(preset).values)
    if config:
        yield _Layer(str(config), read_file(config))
    if flags:
        yield _Layer("flags", flags)


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = re.sub(r" \(at line (\d+), column \d+\)$", "", str(error))
        line = re.search(r"at line (\d+)", str(error))
        place_ = f"{where}:{line[1]}" if line else where
        raise ConfigError(
            f"not valid TOML: {message[:1].lower()}{message[1:]}", hint='texts need quotes: key = "value"', where=place_
        ) from None


def _read(text: str, where: str) -> dict[str, Value]:
    values: dict[str, Value] = {}
    faults: list[Problem] = []
    seen: dict[str, int] = {}
    for name, value in _leaves(_parse(text, where)):
        count = seen.get(name, 0)
        seen[name] = count + 1
        if count:
            told = f"the first is in line {_line_of(text, name, 0)}; keep one"
            faults.append(Problem(_spot(text, name, count, where), f"{name} is set twice", told))
            continue
        try:
            key = find_key(name, where=where)
            values[key.name] = read_value(key, value, where=where)
        except ConfigError as error:  # only now is the line looked for: the wizard reads every preset before its first paint
            faults.append(dataclasses.replace(error.problem, where=_spot(text, name, count, where)))
    if faults:
        raise ConfigErrors(faults)
    return values


def _leaves(table: Mapping[str, Any], *, top: bool = True) -> Iterator[tuple[str, Any]]:
    """Yield keys with their values through all tables; `data` is a key and a group, so its type tells which."""
    for name, value in table.items():
        if top and name == _ABOUT and isinstance(value, dict):
            continue
        if isinstance(value, dict) and (name not in KEYS or name in GROUPS):
            yield from _leaves(value, top=False)
        else:
            yield name, value


def _spot(text: str, name: str, skip: int, where: str) -> str:
    line = _line_of(text, name, skip)
    return f"{where}:{line}" if line else where


def _line_of(text: str, name: str, skip: int) -> int:
    """Return the line, from 1, on which `name` is set for the `skip`-th time; 0 when the scan does not find it."""
    quoted = rf"""["']?{re.escape(name)}["']?"""
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if not line.lstrip().startswith("#")]
    hits = [number for number, line in lines if re.search(rf"(?:^|[{{,.])\s*{quoted}\s*=", line)]
    hits = hits or [number for number, line in lines if re.search(rf"^\s*\[.*{quoted}\s*\]", line)]
    return hits[min(skip, len(hits) - 1)] if hits else 0


_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _bare(key: Key, value: Value) -> str:
    """Return a value as TOML; a number of layers and a switch lose the quotes that the record keeps them in."""
    return str(value) if key.kind == "layers" and value != "auto" else _toml(value)


def _toml(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + "".join(_ESCAPES.get(char) or (char if char.isprintable() else f"\\U{ord(char):08x}") for char in value) + '"'
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(part) for part in value) + "]"
    return repr(value)
