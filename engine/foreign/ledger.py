"""What became of every setting of a foreign config: each is in exactly one of three lists.

`mapped`: it means the same here. `changed`: something near it is done instead, and why. `dropped`: nothing is done, and what
that means for the result. Beside them `defaults`: what the tool takes for granted where the file is silent, and we do not.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from qlora_tui.engine import columns
from qlora_tui.engine.errors import ConfigError
from qlora_tui.engine.foreign.source import Code, Source, shown
from qlora_tui.engine.rules import bounds
from qlora_tui.engine.spec import KEYS, RunConfig, from_values
from qlora_tui.engine.text import one_line
from qlora_tui.engine.values import Key, Value, read_text, read_value

Effect = Literal["", "harmless", "changes", "unknown"]
HARMLESS: Effect = "harmless"
CHANGES: Effect = "changes"
UNKNOWN: Effect = "unknown"
EXPRESSION = "it is computed, and a script is read without being run"
_MOST = 2**63


@dataclass(frozen=True, slots=True)
class Entry:
    """One setting: its path and value in the file, the key and value it became here, and why; `effect` is of a dropped one."""

    source: str
    shown: str
    key: str = ""
    to: Value | None = None
    why: str = ""
    effect: Effect = ""


@dataclass(frozen=True, slots=True)
class Imported:
    """What came of a config: the tool and how it was known, the run, and the lists; `notes` are differences that no key tells of."""

    tool: str
    why: str
    kind: str
    run: RunConfig
    mapped: tuple[Entry, ...]
    changed: tuple[Entry, ...]
    dropped: tuple[Entry, ...]
    defaults: tuple[Entry, ...]
    notes: tuple[str, ...]


class Ledger:
    """Takes the settings of a source one by one; a setting is taken once, and a key is given one value."""

    def __init__(self, tool: str, source: Source) -> None:
        """Open an account for every setting of `source`."""
        self.tool, self.source = tool, source
        self.values: dict[str, Value] = {}
        self.mapped: list[Entry] = []
        self.changed: list[Entry] = []
        self.dropped: list[Entry] = []
        self.defaults: list[Entry] = []
        self.notes: list[str] = list(source.notes)
        self._open = dict(source.leaves)
        self._paths = {source.name(path): path for path in reversed(list(source.leaves))}

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of the setting called `name` in the tool's tables, the first of several; taken or not."""
        path = self._paths.get(name)
        return default if path is None else self.source.leaves[path]

    def has(self, name: str) -> bool:
        """Say whether the file sets `name`."""
        return name in self._paths

    def is_open(self, path: str) -> bool:
        """Say whether nobody has taken the setting at `path` yet."""
        return path in self._open

    def map(self, path: str, key: str, value: Any, why: str = "") -> None:
        """Note that the setting at `path` means `key = value`; a value that cannot be is dropped, and why."""
        self._give(self.mapped, path, key, value, why)

    def change(self, path: str, key: str, value: Any, why: str) -> None:
        """Note that `key = value` is done instead of the setting at `path`."""
        self._give(self.changed, path, key, value, why)

    def drop(self, path: str, why: str, effect: Effect = HARMLESS) -> None:
        """Note that the setting at `path` has no effect here."""
        value = self._open.pop(path)
        self.dropped.append(Entry(path, shown(path, value), why=why, effect=effect))

    def note(self, text: str) -> None:
        """Say something that is no setting of the file."""
        if text not in self.notes:
            self.notes.append(text)

    def default(self, key: str, value: Value, why: str = "") -> None:
        """Take `value` for a key that the file says nothing about; it is listed where it is not our default."""
        if key in self.values:
            return
        self.values[key] = value
        if value != KEYS[key].default:
            self.defaults.append(Entry("", "", key, value, why or f"default of {self.tool}"))

    def revise(self, key: str, value: Value, why: str) -> None:
        """Give `key` another value after all; the setting it came from is then changed, no longer mapped."""
        self.values[key] = value
        for kept in (self.mapped, self.changed):
            moved = [entry for entry in kept if entry.key == key]
            kept[:] = [entry for entry in kept if entry.key != key]
            self.changed += [dataclasses.replace(entry, to=value, why=why) for entry in moved]
        self.defaults[:] = [dataclasses.replace(entry, to=value, why=why) if entry.key == key else entry for entry in self.defaults]

    def close(self, why: str) -> Imported:
        """Return what came of it.

        Raises:
            AssertionError: a setting was not taken: a fault of the program, never of the file.
        """
        if self._open:
            raise AssertionError(f"not accounted for: {list(self._open)}")
        return Imported(
            self.tool,
            why,
            self.source.kind,
            from_values(self.values),
            tuple(self.mapped),
            tuple(self.changed),
            tuple(self.dropped),
            tuple(self.defaults),
            tuple(self.notes),
        )

    def _give(self, kept: list[Entry], path: str, key: str, value: Any, why: str) -> None:
        try:
            read = value_for(key, value)
        except ConfigError as error:
            told = EXPRESSION if isinstance(value, Code) else one_line(error.problem.message)
            self.drop(path, f"{told}; {key} is what it would be without it", CHANGES)
            return
        if read == "" and KEYS[key].default != "":
            self.drop(path, f"it is empty; {key} is what it would be without it")
            return
        if key in self.values and self.values[key] != read:
            self.drop(path, f"{key} is already {shown(key, self.values[key])} by another setting", CHANGES)
            return
        self.values[key] = read
        kept.append(Entry(path, shown(path, self._open.pop(path)), key, read, why))


def value_for(key: str, value: Any) -> Value:
    """Read a foreign value for `key`: YAML takes 1e-4 for text, and tools write 8.0 for 8.

    Raises:
        ConfigError: it is of another type, or out of the key's range.
    """
    row = KEYS[key]
    read = _read(row, value)
    if isinstance(read, tuple) and not all(part.strip() for part in read):
        raise ConfigError(f"one of the names in {shown(key, value)} is empty")
    if key == "data_columns" and isinstance(read, tuple) and (sentence := columns.fault(read)):
        raise ConfigError(one_line(sentence, limit=160))
    if fault := next(iter(bounds(RunConfig(**{key: read}))), None):  # type: ignore[arg-type]  # of the type that the table says
        raise ConfigError(f"{one_line(fault.message)}, {fault.hint}" if fault.hint else one_line(fault.message))
    return read


def _read(row: Key, value: Any) -> Value:
    told = ConfigError(f"{shown(row.name, value)} cannot be {row.name}")
    numeric = row.kind in ("integer", "number", "duration")
    if isinstance(value, (int, float)) and not (math.isfinite(value) and abs(value) < _MOST):
        raise told
    if row.kind == "integer" and isinstance(value, float) and value.is_integer():
        value = int(value)
    if row.kind == "text" and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    try:
        read = read_text(row, value) if numeric and isinstance(value, str) else read_value(row, value)
        (read if isinstance(read, str) else "".join(read) if isinstance(read, tuple) else "").encode()
    except (ConfigError, UnicodeEncodeError):  # half of a surrogate pair is no text that a file can hold
        raise told from None
    return read
