"""How a tool's settings are looked up: plain tables of names, and functions for those that need thought."""

from __future__ import annotations

import importlib.resources
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_tui.engine.foreign.ledger import CHANGES, EXPRESSION, HARMLESS, UNKNOWN, Ledger
from qlora_tui.engine.foreign.source import Code, is_set
from qlora_tui.engine.values import Value

Rule = Callable[[Ledger, str, Any], None]


@dataclass(frozen=True, slots=True)
class Table:
    """`same`: our key for a setting that means the same. `rules`: what decides a setting. `harmless` and `changes`: dropped, and why.

    A name in the last two stands for all that lies below it too. `rules` are asked for null only where `nulls` names the setting.
    """

    same: Mapping[str, str] = field(default_factory=dict)
    rules: Mapping[str, Rule] = field(default_factory=dict)
    harmless: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, str] = field(default_factory=dict)
    nulls: frozenset[str] = frozenset()

    def __or__(self, other: Table) -> Table:
        """Return both; where they differ `other` wins, whichever of its tables names a setting."""
        own = {*other.same, *other.rules, *other.harmless, *other.changes}

        def joined(one: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
            return {name: what for name, what in one.items() if name not in own} | dict(more)

        return Table(
            joined(self.same, other.same),
            joined(self.rules, other.rules),
            joined(self.harmless, other.harmless),
            joined(self.changes, other.changes),
            self.nulls | other.nulls,
        )

    def apply(self, ledger: Ledger) -> None:
        """Take every setting that is still open."""
        for path in ledger.source.leaves:
            if ledger.is_open(path):
                self.take(ledger, path, ledger.source.name(path))

    def take(self, ledger: Ledger, path: str, name: str) -> None:
        """Take the setting at `path`, which is called `name` in this table."""
        value = ledger.source.leaves[path]
        if value is None and name not in self.nulls:
            ledger.drop(path, "not set")
        elif name in self.rules:
            self.rules[name](ledger, path, value)
        elif name in self.same:
            ledger.map(path, self.same[name], value)
        else:
            self._drop(ledger, path, name, value)

    def _drop(self, ledger: Ledger, path: str, name: str, value: Any) -> None:
        while name and name not in self.harmless and name not in self.changes:
            name = name[: max(name.rfind("."), name.rfind("["), 0)]  # what it lies below
        if name in self.harmless:
            ledger.drop(path, self.harmless[name], HARMLESS)
        elif not is_set(value):
            ledger.drop(path, "off: it does nothing", HARMLESS)
        elif name in self.changes:
            ledger.drop(path, self.changes[name], CHANGES)
        elif isinstance(value, Code):
            ledger.drop(path, EXPRESSION, UNKNOWN)
        else:
            ledger.drop(path, f"not a setting of {ledger.tool} that is known here", UNKNOWN)


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool. `signs` are names that only it uses, `programs` the modules or programs that tell it.

    `start` sees the ledger before the table and may refuse what cannot be trained here; `finish` gives what the tool takes for granted.
    """

    name: str
    title: str
    signs: frozenset[str]
    programs: frozenset[str]
    table: Table
    start: Callable[[Ledger], None]
    finish: Callable[[Ledger], None]


def read(file: str, section: str, *, rules: Mapping[str, Rule], nulls: frozenset[str] = frozenset()) -> Table:
    """Return the table called `section` in the data file called `file`, with the rules that need more than a name.

    In the file `same` gives our key for each name; `harmless` and `changes` give names, with spaces between them, for each reason.
    """
    text = importlib.resources.files("qlora_tui.engine.foreign").joinpath(f"{file}.toml").read_text(encoding="utf-8")
    found: dict[str, dict[str, str]] = tomllib.loads(text)[section]
    harmless, changes = (
        {name: why for why, names in found.get(part, {}).items() for name in names.split()} for part in ("harmless", "changes")
    )
    return Table(found.get("same", {}), rules, harmless, changes, nulls)


def defaults(ledger: Ledger, values: Mapping[str, Value]) -> None:
    """Take what the tool takes for granted, for each key that the file says nothing about."""
    for key, value in values.items():
        ledger.default(key, value)
