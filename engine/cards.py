"""Cards that one may have or want: memory, speed, and where each figure was read.

Figures are the vendors', not ours, so every row of `cards.json` names its document, and says which was taken where
two disagree. A card that this project has measured is marked; all others are estimates until somebody runs one.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
from dataclasses import dataclass

from qlora_tui.engine.errors import ConfigError
from qlora_tui.engine.spec import nearest

_MIB = 1 << 20
_MAKERS = {"nvidia", "geforce", "tesla", "gpu", "amd", "instinct"}
_OTHER_CARDS = {"ti", "super", "laptop", "mobile", "mig", "max", "d", "nvl"}  # such a word after a name makes it another card


@dataclass(frozen=True, slots=True)
class Card:
    """A known card: memory in bytes, bytes and operations a second, and how far to trust them.

    `flops` are dense bf16 products with 32-bit accumulation, or 32-bit products where `bf16` is false.
    `power_watts` is what the board may take, `power_source` where that was read, or that it is an estimate.
    `capability` is CUDA's and None for a card of another maker. `note` is a warning for people, mostly empty.
    """

    name: str
    memory_bytes: int
    bandwidth_bytes: float
    flops: float
    bf16: bool
    capability: tuple[int, int] | None
    power_watts: float = 0.0
    power_source: str = ""
    source: str = ""
    tested: bool = False
    note: str = ""


@functools.cache
def cards() -> tuple[Card, ...]:
    """Return the known cards: consumer cards by generation, then workstation and server cards."""
    table = json.loads(importlib.resources.files("qlora_tui.engine").joinpath("cards.json").read_text(encoding="utf-8"))
    return tuple(
        Card(
            name=row["name"],
            memory_bytes=row["memory_mib"] * _MIB,
            bandwidth_bytes=row["bandwidth_gb_s"] * 1e9,
            flops=row["bf16_tflops"] * 1e12,
            bf16=row["bf16"],
            capability=tuple(row["capability"]) if row["capability"] else None,
            power_watts=float(row["power_watts"]),
            power_source=str(row["power_source"]),
            source=row["source"],
            tested=row["tested"],
            note=row.get("note", ""),
        )
        for row in table["cards"]
    )


def find(name: str) -> Card:
    """Return the card that people call `name`; case, blanks, "NVIDIA", "GeForce" and "RTX" do not matter.

    A short name ("4090", "h100"), the table's own and the one that a driver prints are all understood.

    Raises:
        ConfigError: no such card is known, or more than one; the nearest are named.
    """
    tokens = _tokens(name)
    wanted = "".join(tokens)
    found = [card for card in cards() if "".join(_tokens(card.name)) == wanted]
    found = found or [card for card in cards() if "".join(_stem(card)) == wanted]
    found = found or _called(tokens, sized=True)
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"more than one card is called {name!r}", hint=f"say {' or '.join(card.name for card in found)}", where="--card")
    hint = nearest(name.upper(), [card.name for card in cards()])
    raise ConfigError(f"no card called {name!r}", hint=hint or f"known: {', '.join(card.name for card in cards())}", where="--card")


@functools.lru_cache(maxsize=64)
def known(driver_name: str, memory_bytes: int) -> Card | None:
    """Return the card that a driver calls `driver_name`, the nearest in memory where a name has two sizes.

    Memory decides only between two of one name: a card may be limited, or seen without its last few MiB.
    A laptop's chip and a slice of a card are slower than the card whose name they bear, so they are strangers.
    """
    return min(_called(_tokens(driver_name)), key=lambda card: abs(card.memory_bytes - memory_bytes), default=None)


def _called(tokens: list[str], *, sized: bool = False) -> list[Card]:
    """Return the cards that a driver's words may mean: those of the longest name, and of the size in the words if `sized`."""
    found = [card for card in cards() if _is_called(tokens, card) and (not sized or _size(card.name) <= _size(" ".join(tokens)))]
    longest = max((len(_stem(card)) for card in found), default=0)
    return [card for card in found if len(_stem(card)) == longest]


def _is_called(tokens: list[str], card: Card) -> bool:
    stem = _stem(card)
    return tokens[: len(stem)] == stem and not _OTHER_CARDS & set(tokens[len(stem) :])


def _tokens(name: str) -> list[str]:
    words = (part.removeprefix("rtx") for part in re.findall(r"[a-z0-9]+", name.lower()))
    return [word for word in words if word and word not in _MAKERS]


def _stem(card: Card) -> list[str]:
    return [part for part in _tokens(card.name) if not _size(part)]


def _size(name: str) -> set[str]:
    return set(re.findall(r"\b\d+gb\b", name.lower()))
