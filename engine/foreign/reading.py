"""Reads a foreign config of any form into a `Source`: YAML, JSON, a command line, a script or a notebook. Nothing in it is run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qlora_tui.engine.errors import ConfigError
from qlora_tui.engine.foreign import commandline, scripts
from qlora_tui.engine.foreign.source import Source, flatten
from qlora_tui.engine.text import one_line
from qlora_tui.engine.units import gib

MOST_BYTES = 128 * 2**10
"""A config is a few KiB; reading YAML takes seconds for so much."""
_MOST_BY_ENDING = {".py": 2**19, ".ipynb": 32 * 2**20}  # notebooks keep what they drew
_MOST_ALIASES = 100
_MOST_NOTES = 10
_MOST_PAIRS = 2_000
_TOML = "this is TOML, as our own configs are"


def read(path: Path) -> Source:
    """Return what the file at `path` holds.

    Raises:
        ConfigError: it cannot be read, is far too large, or is none of the forms that are known.
    """
    where, ending = one_line(path), path.suffix.lower()
    text = _text(path, where, _MOST_BY_ENDING.get(ending, MOST_BYTES))
    if ending == ".toml":
        raise ConfigError(_TOML, hint=f"say qlora-tui --config {where}", where=where)
    try:
        if ending in (".py", ".ipynb"):
            return scripts.read(path, text, where)
        if ending in (".sh", ".bash", ".txt") or text.startswith("#!"):
            return commandline.read(path, text, where)
        return _settings(path, text, where)
    except RecursionError:
        raise ConfigError("it is nested too deeply to be a config", where=where) from None


def _text(path: Path, where: str, most: int) -> str:
    try:
        size = path.stat().st_size
        if size > most:
            raise ConfigError(f"it has {gib(size)}, and a config has a few KiB", hint="name the config itself", where=where)
        with path.open("rb") as file:
            return file.read(most).decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError("there is no such file", hint="name a YAML, JSON, .py, .ipynb or .sh file of another tool", where=where) from None
    except IsADirectoryError:
        raise ConfigError("this is a folder", hint="name the config in it", where=where) from None
    except UnicodeDecodeError:
        raise ConfigError("it is not UTF-8 text", hint="save it as UTF-8", where=where) from None
    except OSError as error:
        raise ConfigError(f"it cannot be read: {error.strerror or error}", where=where) from None
    except ValueError:  # a NUL in its name
        raise ConfigError("this cannot be a file name", where=where) from None


def _settings(path: Path, text: str, where: str) -> Source:
    as_json = path.suffix.lower() == ".json"
    notes: list[str] = []
    tree = _json(text, where, notes) if as_json else _yaml(text, where, notes)
    if not isinstance(tree, Mapping):
        said = "is empty" if tree in (None, "") else "holds no settings by name"
        raise ConfigError(f"it {said}", hint="name the tool's YAML or JSON config, script, notebook or command line", where=where)
    return Source(path, "JSON" if as_json else "YAML", flatten(tree, where), notes=tuple(notes))


def _json(text: str, where: str, notes: list[str]) -> Any:
    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        notes.extend(_twice([name for name, _ in found]))
        return dict(found)

    try:
        return json.loads(text, object_pairs_hook=pairs)
    except ValueError as error:
        raise ConfigError(f"it is no JSON: {one_line(error, limit=120)}", where=where) from None


def _yaml(text: str, where: str, notes: list[str]) -> Any:
    try:
        return _Loader(text, notes).get_single_data()
    except yaml.constructor.ConstructorError as error:
        raise ConfigError(f"it cannot be read as plain values: {_problem(error)}", where=_line(error, where)) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"it is no YAML: {_problem(error)}", where=_line(error, where)) from None
    except (ValueError, OverflowError, TypeError) as error:  # a date that is none, a number of 5000 digits
        raise ConfigError(f"it holds a value that is none: {one_line(error, limit=120)}", where=where) from None


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """PyYAML's safe loader, which makes plain values only, with a limit on what a few lines can stand for.

    An alias costs nothing until it is looked through, but `<<` copies what it names, and copies of copies fill any memory.
    """

    def __init__(self, text: str, notes: list[str]) -> None:
        super().__init__(text)
        self._notes, self._aliases = notes, 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Count aliases as they are met."""
        if self.check_event(yaml.AliasEvent):
            self._aliases += 1
            if self._aliases > _MOST_ALIASES:
                raise _too_much(f"more than {_MOST_ALIASES} aliases", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def flatten_mapping(self, node: Any) -> None:
        """Notice a key that is set twice, of which YAML keeps the last, and merges that grow without end."""
        self._notes += _twice([key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"])
        super().flatten_mapping(node)
        if len(node.value) > _MOST_PAIRS:
            raise _too_much(f"one table of more than {_MOST_PAIRS} settings", node.start_mark)


def _too_much(told: str, mark: Any) -> Exception:
    found: Exception = yaml.constructor.ConstructorError(None, None, told, mark)
    return found


def _twice(names: list[str]) -> list[str]:
    twice = [name for name, count in Counter(names).items() if count > 1]
    return [f"{one_line(name, limit=60)} is set twice; the last one counts, as in the tool" for name in twice[:_MOST_NOTES]]


def _problem(error: yaml.YAMLError) -> str:
    """Return what PyYAML says, and for a tag that would make an object why it is not obeyed."""
    said = one_line(error.problem or error.context or "it ends too soon", limit=160) if isinstance(error, yaml.MarkedYAMLError) else ""
    said = said or one_line(error, limit=160)
    return f"{said}; a tag that makes an object could run code" if "constructor for the tag" in said else said


def _line(error: yaml.YAMLError, where: str) -> str:
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    return f"{where}:{mark.line + 1}" if mark is not None else where
