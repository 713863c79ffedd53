"""What things cost a person: `prices.toml` in the config folder over the prices that ship, each of which says where it was read.

    electricity = [0.28, 0.34]    # a number, or a range: low and high
    card_price = 900

`qlora-tui money KEY=VALUE` writes it, and it may be edited by hand: both are checked alike. Keys left out keep what ships.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tui.engine import cards
from qlora_tui.engine.errors import ConfigError
from qlora_tui.engine.places import locked, place, replace_file
from qlora_tui.engine.spec import nearest
from qlora_tui.engine.text import one_line

FILE = "prices.toml"
_TEXTS = ("currency", "rent_card")
_ABOVE_ZERO = ("card_hours",)
_MOST = 1e9
_MOST_SIGN = 4

Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Prices:
    """The prices to reckon with, each a range (low, high); `own` are the keys that a person has set. Keys as in `table()`."""

    currency: str
    electricity: Range
    card_price: Range
    card_hours: Range
    watts: Range
    rest_watts: Range
    cpu_watts: Range
    rent: Range
    rent_card: str
    setup_hours: Range
    own: tuple[str, ...] = ()


def table() -> Mapping[str, Mapping[str, Any]]:
    """Return every key with its `default`, `help` and `source`."""
    found: Mapping[str, Mapping[str, Any]] = _shipped()["keys"]
    return found


def launch_price(card: str) -> tuple[float, str] | None:
    """Return what a card cost when it came out, and who said so; None where it is not listed, as for cards sold to companies alone."""
    row = _shipped()["cards"].get(card)
    return (float(row["price"]), str(row["source"])) if row else None


def path() -> Path:
    """Return where a person's own prices lie."""
    return place("config") / FILE


def read() -> Prices:
    """Return the prices that ship with a person's own over them.

    Raises:
        ConfigError: the file is not TOML, names no key of ours, or a price that is none.
    """
    own = _own()
    values = {name: _read(name, own.get(name, row["default"]), str(path())) for name, row in table().items()}
    return Prices(**values, own=tuple(own))


def usable() -> tuple[Prices, str]:
    """Return the prices to show beside other things, and what is wrong with the person's own, in which case they are left out."""
    try:
        return read(), ""
    except ConfigError as error:
        values = {name: _read(name, row["default"], "") for name, row in table().items()}
        return Prices(**values), str(error)


def save(changes: Mapping[str, str]) -> Prices:
    """Keep prices as typed (`0.3`, `3-5`, a name); an empty one goes back to what ships. Nothing is kept unless all are good.

    Raises:
        ConfigError: a key there is not, with the nearest one; a price that is none; the file as it is cannot be read.
        OSError: it cannot be written.
    """
    with locked(path()):
        own = dict(_own())
        for name, text in changes.items():
            _known(name, "")
            own.pop(name, None)
            if text.strip():
                value = _read(name, _typed(name, text), "")
                own[name] = value if isinstance(value, str) else [*value] if value[0] != value[1] else value[0]
        replace_file(path(), "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in own.items()))
    return read()


def _own() -> Mapping[str, Any]:
    where = str(path())
    try:
        found: dict[str, Any] = tomllib.loads(path().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be read: {one_line(error)}", where=where) from None
    for name in found:
        _known(name, where)
    return found


def _known(name: str, where: str) -> None:
    if name not in table():
        raise ConfigError(
            f"no price called {one_line(name)!r}", hint=nearest(name, [*table()]) or f"there are {', '.join(table())}", where=where
        )


def _typed(name: str, text: str) -> Any:
    """Return what is typed on a command line as TOML would hold it: `3-5` and `3 - 5` are ranges."""
    if name in _TEXTS:
        return text.strip()
    try:
        return [float(part) for part in text.replace("–", "-").split("-")]
    except ValueError:
        return text


def _read(name: str, value: Any, where: str) -> Any:
    """Return a value of its key's type."""
    if name == "rent_card" and isinstance(value, str):
        return cards.find(value).name
    if name in _TEXTS:
        if isinstance(value, str) and 0 < len(value) <= _MOST_SIGN and value == one_line(value):
            return value
        raise ConfigError(f"{name} = {one_line(value)!r} is no sign of a currency", hint="such as $, € or CHF", where=where)
    ends = value if isinstance(value, list) else [value]
    good = 0 < len(ends) <= 2 and all(isinstance(end, (int, float)) and not isinstance(end, bool) and 0 <= end <= _MOST for end in ends)
    if not good or not all(math.isfinite(end) for end in ends) or ends[0] > ends[-1] or (name in _ABOVE_ZERO and not ends[0]):
        least = "above 0" if name in _ABOVE_ZERO else "of at least 0"
        raise ConfigError(f"{name} = {one_line(value)} is no price", hint=f"a number {least}, or a range such as 3-5", where=where)
    return float(ends[0]), float(ends[-1])


@functools.cache
def _shipped() -> Mapping[str, Any]:
    text = importlib.resources.files("qlora_tui.engine").joinpath("prices.json").read_text(encoding="utf-8")
    found: Mapping[str, Any] = json.loads(text)
    return found
