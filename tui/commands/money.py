"""`money`: the prices that budgets and reports reckon with, shown with where each is from, and a person's own kept."""

from __future__ import annotations

import argparse
from typing import Any

from qlora_tui.engine import prices
from qlora_tui.engine.errors import ConfigError, ExitCode, SpaceError
from qlora_tui.engine.money import amount
from qlora_tui.engine.text import one_line
from qlora_tui.tui.printer import Streams, table

_PLAIN = ("card_hours", "watts", "rest_watts", "cpu_watts", "setup_hours")
_UNITS = {
    "card_hours": " h",
    "watts": " W",
    "rest_watts": " W",
    "cpu_watts": " W",
    "setup_hours": " h",
    "electricity": " a kWh",
    "rent": " an hour",
}


def money(options: argparse.Namespace) -> int:
    """Keep the prices that were given, all or none, then print every one."""
    changes = dict(_pair(text) for text in options.prices)
    streams = Streams()
    if changes:
        try:
            found = prices.save(changes)
        except OSError as error:
            raise SpaceError(f"cannot be written: {one_line(error.strerror or error)}", where=str(prices.path())) from None
        streams.talk.line(f"kept in {prices.path()}")
    else:
        found = prices.read()
    if options.json:
        streams.data.document(_document(found))
        return int(ExitCode.DONE)
    rows = [(name, _shown(found, name), "yours" if name in found.own else "", _why(found, name)) for name in prices.table()]
    streams.data.write(table(("price", "is", "", "what for"), rows))
    streams.talk.line(
        "qlora-tui money electricity=0.31 rent=2-3 keeps yours; electricity= goes back; budget and report.md reckon with them"
    )
    return int(ExitCode.DONE)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"{one_line(text)!r} has no `=`", hint="say electricity=0.31", where="money")
    return name.strip(), value


def _shown(found: prices.Prices, name: str) -> str:
    value = _value(found, name)
    if isinstance(value, str):
        return value
    if not value[1] and name in ("card_price", "watts"):
        return "as listed"
    return amount(value, "" if name in _PLAIN else found.currency) + _UNITS.get(name, "")


def _why(found: prices.Prices, name: str) -> str:
    row = prices.table()[name]
    source = "" if name in found.own or not row["source"] else f" Source: {row['source']}."
    return f"{row['help']}{source}"


def _value(found: prices.Prices, name: str) -> Any:
    return getattr(found, name)  # the record's fields are the keys of the table


def _document(found: prices.Prices) -> dict[str, Any]:
    keys = prices.table()
    rows = {
        name: {"value": _value(found, name), "yours": name in found.own, "help": row["help"], "source": row["source"]}
        for name, row in keys.items()
    }
    return {"prices": rows, "file": str(prices.path())}
