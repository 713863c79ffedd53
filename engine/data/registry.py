"""LLaMA-Factory's `dataset_info.json`: datasets by name, each with its file, its shape and what its columns are called.

A project made for that tool can be used as it is. Rows are given the names that our formats know; what an entry asks
for and is not followed is said.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tui.engine.errors import BadRow, DataError
from qlora_tui.engine.spec import nearest
from qlora_tui.engine.text import one_line

FILE = "dataset_info.json"
_MOST_BYTES = 16 * 2**20
_NAMES_SHOWN = 12
_PLACES = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")

_ALPACA_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}
_ALPACA_NAMES = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
_CHAT_COLUMNS = {"messages": "conversations"}
_NOT_READ = ("images", "videos", "audios", "chosen", "rejected", "kto_tag")
_TAGS = {
    "user_tag": ("human", "human", "user"),
    "assistant_tag": ("gpt", "gpt", "assistant"),
    "observation_tag": ("observation", "observation", "tool"),
    "function_tag": ("function_call", "function_call", "function_call"),
    "system_tag": ("system", "system", "system"),
}
"""For each tag: what it is if the entry does not say, and the role it stands for in ShareGPT rows and in messages."""

Row = Mapping[str, object]
Convert = Callable[[Row], Row]


@dataclass(frozen=True, slots=True)
class Entry:
    """One dataset of a registry: a file or a hub name, and how its rows become rows of a known shape."""

    file: Path | None
    hub: str
    subset: str
    split: str
    convert: Convert
    format: str
    notes: tuple[str, ...] = ()


def read_registry(path: Path) -> Mapping[str, Mapping[str, Any]] | None:
    """Return the entries of `path` by name; None if it is no registry, such as the file of that name that `datasets` writes.

    Raises:
        DataError: it is no JSON, or unusually large.
    """
    shown = one_line(path)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise DataError(f"it is larger than {_MOST_BYTES // 2**20} MiB", where=shown)
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"it cannot be read as JSON ({one_line(error, limit=120)})", where=shown) from None
    if not isinstance(found, dict) or not found:
        return None
    entries = {name: value for name, value in found.items() if isinstance(value, dict) and any(place in value for place in _PLACES)}
    return entries if len(entries) == len(found) else None


def find_entry(path: Path, entries: Mapping[str, Mapping[str, Any]], name: str) -> Entry:
    """Return the entry called `name`; empty: the only one there is.

    Raises:
        DataError: there is none of that name, none was named, or it asks for something that is not done here.
    """
    shown = one_line(path)
    if not name and len(entries) > 1:
        listed = ", ".join(one_line(entry, limit=40) for entry in list(entries)[:_NAMES_SHOWN])
        more = f" and {len(entries) - _NAMES_SHOWN} more" if len(entries) > _NAMES_SHOWN else ""
        first = one_line(next(iter(entries)), limit=40)
        raise DataError(f"it names {len(entries)} datasets: {listed}{more}", hint=f"say which: {shown}:{first}", where=shown)
    name = name or next(iter(entries))
    if name not in entries:
        known = ", ".join(one_line(entry, limit=40) for entry in list(entries)[:_NAMES_SHOWN])
        raise DataError(
            f"it names no dataset {one_line(name, limit=60)!r}", hint=nearest(name, list(entries)) or f"it names {known}", where=shown
        )
    return _entry(path, name, entries[name])


def _entry(path: Path, name: str, entry: Mapping[str, Any]) -> Entry:
    where = f"{one_line(path)}:{one_line(name, limit=60)}"
    columns, tags = (_texts(entry.get(part), part, where) for part in ("columns", "tags"))
    asked = [part for part in _NOT_READ if columns.get(part)]
    if asked or entry.get("ranking"):
        what = "preferences" if entry.get("ranking") or asked[0] in ("chosen", "rejected", "kto_tag") else asked[0]
        raise DataError(f"it holds {what}, which cannot be trained here", where=where)
    convert, form = _converter(str(entry.get("formatting", "alpaca")), columns, tags, where)
    file, hub = entry.get("file_name"), entry.get("hf_hub_url")
    if not isinstance(file, str) and not isinstance(hub, str):
        raise DataError("it has neither file_name nor hf_hub_url, and nothing else is read here", where=where)
    notes = []
    if entry.get("num_samples"):
        notes.append(f"{where}: its num_samples is not followed; data_weights and max_samples choose how many rows are used.")
    return Entry(
        file=path.parent / file if isinstance(file, str) else None,
        hub="" if isinstance(file, str) else str(hub),
        subset=str(entry.get("subset") or ""),
        split=str(entry.get("split") or ""),
        convert=convert,
        format=form,
        notes=tuple(notes),
    )


def _texts(value: object, part: str, where: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(text is None or isinstance(text, str) for text in value.values()):
        raise DataError(f"its {part} are no names", where=where)
    return {name: text for name, text in value.items() if text}


def _converter(formatting: str, columns: Mapping[str, str], tags: Mapping[str, str], where: str) -> tuple[Convert, str]:
    if formatting == "alpaca":
        chosen = columns or _ALPACA_COLUMNS  # an entry that names columns uses no others
        names = {column: _ALPACA_NAMES[part] for part, column in chosen.items() if part in _ALPACA_NAMES}
        needed = tuple(chosen[part] for part in ("prompt", "response") if part in chosen)
        return lambda row: _renamed(row, names, needed), "alpaca"
    if formatting not in ("sharegpt", "openai"):
        raise DataError(f"its formatting {one_line(formatting, limit=40)!r} is not known", hint="alpaca, sharegpt or openai", where=where)
    openai = formatting == "openai"
    chosen = columns or _CHAT_COLUMNS
    column = chosen.get("messages", "messages" if openai else "conversations")
    names = {column: "messages" if openai else "conversations"} | {chosen[part]: part for part in ("system", "tools") if part in chosen}
    usual = ("role", "content") if openai else ("from", "value")
    found = (tags.get("role_tag", usual[0]), tags.get("content_tag", usual[1]))
    roles = {tags.get(tag, default): named for tag, (default, *both) in _TAGS.items() if (named := both[openai])}
    speak = _Speaker(dict(zip(found, usual, strict=True)), usual[0], roles)
    return lambda row: speak.row(_renamed(row, names, (column,)), names[column]), "messages" if openai else ""


@dataclass(frozen=True, slots=True)
class _Speaker:
    """Gives messages the keys and roles that are known here."""

    keys: Mapping[str, str]
    role: str
    roles: Mapping[str, str]

    def row(self, row: dict[str, object], column: str) -> Row:
        messages = row[column]
        if isinstance(messages, (list, tuple)):
            row[column] = [self._message(item) for item in messages]
        return row

    def _message(self, item: object) -> object:
        if not isinstance(item, Mapping):
            return item  # the format says what is wrong with it
        message = {self.keys.get(key, key): value for key, value in item.items()}
        said = message.get(self.role)
        return message | {self.role: self.roles.get(said, said)} if isinstance(said, str) else message


def _renamed(row: Row, names: Mapping[str, str], needed: tuple[str, ...]) -> dict[str, object]:
    missing = next((column for column in needed if column not in row), None)
    if missing is not None:
        raise BadRow(f"there is no such column, and {FILE} names it", field=missing)
    return {new: row[old] for old, new in names.items() if old in row}
