"""A foreign config as found: every setting by its path, whatever file it came from.

Nothing in it has been run. What a script computes stays the text of its expression.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_tui.engine.errors import ConfigError
from qlora_tui.engine.text import one_line, redact

MOST_VALUES = 5_000
"""A config has a few hundred values; aliases of YAML can stand for billions in a few lines."""
MOST_LEVELS = 32
_SHOWN = 100
_SECRET = re.compile(r"(^|_)(api_?key|secret|password|passwd|(hf|hub|wandb|ms|om|auth|access|api|push_to_hub)_token|token)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Code:
    """An expression of a script that is no plain value; it is shown and never run."""

    text: str


@dataclass(frozen=True, slots=True)
class Source:
    """What a file holds. `leaves` are values by path, such as `datasets[0].type`; `names` says what each is called in a tool's tables.

    `hints` are what else tells the tool: modules that a script imports, programs that a command line starts.
    """

    path: Path
    kind: str
    leaves: Mapping[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)
    hints: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    def name(self, path: str) -> str:
        """Return what the setting at `path` is called in a tool's tables: without the places in lists."""
        return self.names.get(path) or re.sub(r"\[\d+\]", "[]", path)


def flatten(tree: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """Return every value of `tree` by its path; a list of plain values is one value.

    Raises:
        ConfigError: it stands for more values, or more levels, than a config has.
    """
    _refuse_too_much(tree, where)
    found: dict[str, Any] = {}
    for path, value in _leaves(tree, ""):
        name, again = path, 1
        while name in found:  # {"a.b": 1, "a": {"b": 2}}, or 1 beside "1"
            again += 1
            name = f"{path} ({again})"
        found[name] = value
    return found


def shown(path: str, value: object) -> str:
    """Return `value` as one line to be read; a secret's value is never shown.

    >>> shown("bf16", True), shown("hf_token", "abc"), shown("tags", ["a", 1])
    ('true', '[redacted]', '[a, 1]')
    """
    if _SECRET.search(path.rsplit(".", 1)[-1]) and isinstance(value, str) and value:
        return "[redacted]"
    return redact(one_line(_text(value), limit=_SHOWN))


def is_set(value: object) -> bool:
    """Say whether `value` asks for anything: not null, false, zero, nothing or an empty list."""
    return isinstance(value, Code) or not (value is None or value is False or value in ("", 0) or value == [] or value == {})


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{_key(key)}" if path else _key(key))
    elif isinstance(tree, (list, tuple)) and any(isinstance(part, Mapping) for part in tree):
        for place, value in enumerate(tree):
            yield from _leaves(value, f"{path}[{place}]")
    else:
        yield path, tree


def _key(key: object) -> str:
    return key if isinstance(key, str) else _text(key)


def _refuse_too_much(tree: Any, where: str) -> None:
    """Count values before anything is made of them: the same list met twice counts twice, and one that holds itself never ends."""
    waiting, count = [(tree, 0)], 0
    while waiting:
        value, level = waiting.pop()
        count += 1
        if count > MOST_VALUES or level > MOST_LEVELS:
            raise ConfigError(f"it stands for more than {MOST_VALUES} values or {MOST_LEVELS} levels, and no config does", where=where)
        if isinstance(value, Mapping):
            waiting += [(part, level + 1) for part in value.values()]
        elif isinstance(value, (list, tuple, set)):
            waiting += [(part, level + 1) for part in value]


def _text(value: object) -> str:
    if isinstance(value, Code):
        return value.text
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple, set, frozenset)):
        return f"[{', '.join(_text(part) for part in value)}]"
    try:
        return str(value)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        return "a number of thousands of digits"
