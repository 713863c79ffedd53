"""Datasets that a foreign config names, as `data`, `data_format` and `data_columns`: several entries make one value each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora_tui.engine.data.hub_rows import is_hub_name
from qlora_tui.engine.foreign.ledger import CHANGES, Ledger
from qlora_tui.engine.foreign.table import Table

LOADERS = ("json", "csv", "parquet", "text", "arrow")
"""What `datasets` calls a reader of files: no dataset, its files are."""
_ALIKE = "every dataset's rows are read in one format here; as they differ, each is known by its rows"


@dataclass(slots=True)
class Named:
    """One entry of a list of datasets: what it names, where its fields stand, and what its rows are like.

    `why` says what is different about rows of that `format` here; empty: nothing.
    """

    names: list[str]
    fields: Mapping[str, str]
    format: str = ""
    why: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    by_field: dict[str, str] = field(default_factory=dict)


def hub_name(path: str, split: object = "", subset: object = "") -> str:
    """Return a dataset's name with its subset and split, as far as they can be said: `train` goes without saying.

    >>> hub_name("owner/rows", "test"), hub_name("owner/rows", "train[:5%]", "en"), hub_name("rows.jsonl", "test")
    ('owner/rows:test', 'owner/rows@en:train[:5%]', 'rows.jsonl')
    """
    if not is_hub_name(path):
        return path
    named = f"{path}@{subset}" if subset and isinstance(subset, str) and is_hub_name(f"{path}@{subset}") else path
    whole = f"{named}:{split}"
    return whole if split not in ("", "train") and isinstance(split, str) and is_hub_name(whole) else named


def part_of_name(ledger: Ledger, path: str, key: str, name: str) -> None:
    """Take a split or a subset that is part of the dataset's `name`, which `key` is given; what could not be said in it is dropped."""
    value = ledger.source.leaves[path]
    if value == "train" or not name:
        ledger.drop(path, "part of the name of the data" if name else "it names no data")
    elif isinstance(value, str) and f"{value}:" in name.replace("@", ":") + ":":
        ledger.map(path, key, name)
    else:
        ledger.drop(path, "it cannot be told here which part of the dataset this is: all of its rows are used", CHANGES)


def files_of(value: Any) -> list[str]:
    """Return the files that `data_files` names: one, a list, or the train part of several."""
    if isinstance(value, str):
        return [value]
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


class Sources:
    """Takes the fields of all entries of one list; what no entry explains goes by `table`, by its name inside the entry."""

    def __init__(self, ledger: Ledger, named: Sequence[Named], table: Table) -> None:
        """Prepare; nothing is taken yet."""
        self.ledger, self.named, self.table = ledger, named, table

    def take(self, key: str) -> None:
        """Take every field; `key` is `data` or `eval_data`, of which one name is all there can be."""
        names = [name for one in self.named for name in one.names]
        formats = {one.format for one in self.named}
        columns = {ours: column for one in self.named for ours, column in one.columns.items()}
        agree = all(columns[ours] == column for one in self.named for ours, column in one.columns.items())
        for one in self.named:
            for name, path in one.fields.items():
                if name in ("path", "data_files", "split", "name"):
                    self._place(key, one, name, path, names)
                elif key == "data" and name in ("type", "type.format") and one.format:
                    self._format(one, path, alike=len(formats) == 1)
                elif key == "data" and name in one.by_field and agree:
                    self.ledger.map(path, "data_columns", [f"{ours}={column}" for ours, column in columns.items()])
                else:
                    self._other(name, path)
        if key == "data" and len(formats) == 1 and self.named and self.named[0].format:
            self.ledger.default("data_format", self.named[0].format, "the rows that it describes")

    def _place(self, key: str, one: Named, name: str, path: str, names: list[str]) -> None:
        value = self.ledger.source.leaves[path]
        if value in (None, "") or not one.names:
            self.ledger.drop(path, "not set" if value in (None, "") else "it names no data")
        elif name == "path" and value in LOADERS:
            self.ledger.drop(path, "the kind of file is told by its ending")
        elif name in ("split", "name") and (value == "train" or f"{value}:" not in one.names[0].replace("@", ":") + ":"):
            part_of_name(self.ledger, path, key, one.names[0])
        elif key == "eval_data" and one is not self.named[0]:
            self.ledger.drop(path, "rows to measure on come from one place; the first is used", CHANGES)
        else:
            self.ledger.map(path, key, names if key == "data" else names[0])

    def _format(self, one: Named, path: str, *, alike: bool) -> None:
        if not alike:
            self.ledger.change(path, "data_format", "auto", _ALIKE)
        elif one.why:
            self.ledger.change(path, "data_format", one.format, one.why)
        else:
            self.ledger.map(path, "data_format", one.format)

    def _other(self, name: str, path: str) -> None:
        self.table.take(self.ledger, path, name)
