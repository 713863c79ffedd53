"""A command line of a tool, as it stands in a script or a documentation page: its options, by name. Nothing is started."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from qlora_tui.engine.errors import ConfigError
from qlora_tui.engine.foreign.source import Code, Source

PROGRAMS = ("trl", "sft.py", "llamafactory-cli", "train_bash.py", "axolotl", "unsloth-cli.py", "unsloth")
"""Programs whose options are settings."""
_VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)\}?")
_SETTING = re.compile(r"([A-Za-z_]\w*)=(.*)")
_NUMBER = re.compile(r"-?(\d|\.\d)")
_LONGEST = 10_000


def read(path: Path, text: str, where: str) -> Source:
    """Return the options of the first command of a known tool in `text`.

    Raises:
        ConfigError: there is none, its quotes do not close, or a word of it grows too long.
    """
    variables: dict[str, str] = {}
    for line in text.replace("\\\n", " ").splitlines():
        words = _words(line, where)
        while words and (setting := _SETTING.fullmatch(words[0])):
            variables[setting[1]] = _filled(setting[2], variables, where)
            words = words[1:]
        place = next((place for place, word in enumerate(words) if PurePath(word).name in PROGRAMS), None)
        if place is not None and len(words) > place + 1:
            program = PurePath(words[place]).name
            options = _options([_filled(word, variables, where) for word in words[place + 1 :]])
            return Source(path, "command line", options, hints=frozenset({program}))
    raise ConfigError(
        "no command of a known tool stands in it", hint=f"one that starts {', '.join(PROGRAMS[:3])} with its options", where=where
    )


def _words(line: str, where: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError as error:
        if any(program in line for program in PROGRAMS):
            raise ConfigError(f"its command line cannot be read: {str(error).lower()}", where=where) from None
        return []


def _filled(word: str, variables: dict[str, str], where: str) -> str:
    """Put the values of variables that the same file sets into `word`; others stay as they are.

    Raises:
        ConfigError: it becomes longer than any setting: variables made of each other double with every line.
    """
    long = len(word) + sum(len(variables.get(match[1], "")) for match in _VARIABLE.finditer(word))
    if long > _LONGEST:
        raise ConfigError(f"a word of it stands for {long} characters, and no setting has so many", where=where)
    return _VARIABLE.sub(lambda match: variables.get(match[1], match[0]), word)


def _options(words: Sequence[str]) -> dict[str, Any]:
    """Return `--name value ...`, `--name=value`, `--flag` and `name=value` by name, dashes in names as underscores."""
    found: dict[str, list[str]] = {}
    name = "subcommand"
    for word in words:
        option = word.startswith("--") and not _NUMBER.match(word[2:])
        if option:
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = [value] if equals else []
        elif name == "subcommand" and (setting := _SETTING.fullmatch(word)):
            found[setting[1]] = [setting[2]]
        else:
            found.setdefault(name, []).append(word)
    return {name: _value(values) for name, values in found.items()}


def _value(values: list[str]) -> Any:
    """Return what an option was given: nothing means yes; a variable that nobody set is an expression."""
    if not values:
        return True
    read = [_plain(value) for value in values]
    return read[0] if len(read) == 1 else read


def _plain(value: str) -> Any:
    words = {"true": True, "false": False, "none": "none", "null": None}
    if value.lower() in words:
        return words[value.lower()]
    return Code(value) if _VARIABLE.search(value) else value
