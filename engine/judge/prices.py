"""What judging costs: an upper estimate before anything is sent, and what was used by what the replies say."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tui.engine.judge.endpoint import Reply
from qlora_tui.engine.places import locked, place, replace_file

_USUAL = Path(__file__).with_name("prices.json")
_MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class Prices:
    """Dollars: for a million tokens in and out where they are known, else for a whole comparison of a pair."""

    comparison: float
    tokens_in: float | None = None
    tokens_out: float | None = None

    @property
    def by_token(self) -> bool:
        """Say whether prices by token are known."""
        return self.tokens_in is not None and self.tokens_out is not None

    def used(self, reply: Reply, size: int) -> float:
        """Return what a reply to a question of `size` bytes cost, by what it says it took; what it does not say counts in full."""
        tokens_in = reply.tokens_in if reply.tokens_in is not None else most_tokens(size)
        tokens_out = reply.tokens_out if reply.tokens_out is not None else reply_tokens()
        return self._of(tokens_in, tokens_out)

    def most(self, size: int) -> float:
        """Return what one question of `size` bytes can cost at most."""
        return self._of(most_tokens(size), reply_tokens())

    def estimate(self, sizes: Iterable[int]) -> float:
        """Return what questions of these sizes can cost at most, all together."""
        return sum(map(self.most, sizes))

    def _of(self, tokens_in: int, tokens_out: int) -> float:
        if self.tokens_in is None or self.tokens_out is None:
            return self.comparison / 2
        return (tokens_in * self.tokens_in + tokens_out * self.tokens_out) / _MILLION

    @property
    def words(self) -> str:
        """Return on what an estimate rests."""
        if self.by_token:
            return f"${self.tokens_in:g} and ${self.tokens_out:g} a million tokens in and out, replies of {reply_tokens()} tokens at most"
        if not self.comparison:
            return "this machine asks for no money"
        return f"${self.comparison:.2f} a comparison, an upper estimate; --price-in and --price-out say better"


def prices_of(model: str, tokens_in: float | None, tokens_out: float | None, *, free: bool = False) -> Prices:
    """Return the prices of `model`: as given, else as given the last time, else the upper estimate; `free` where nobody asks for money."""
    known = _kept().get(model)
    if tokens_in is None and tokens_out is None and known is not None:
        tokens_in, tokens_out = known
    return Prices(0.0 if free else usual_comparison(), tokens_in, tokens_out)


def keep_prices(model: str, prices: Prices) -> None:
    """Remember the prices by token of `model` for the next time; a full disk costs only that."""
    if prices.tokens_in is None or prices.tokens_out is None:
        return
    with contextlib.suppress(OSError), locked(_file()):
        replace_file(_file(), json.dumps({**_kept(), model: (prices.tokens_in, prices.tokens_out)}, indent=1))


def most_tokens(size: int) -> int:
    """Return how many tokens a text of `size` bytes has, rather too many than too few."""
    return math.ceil(size / float(_usual()["bytes_a_token"]))


def reply_tokens() -> int:
    """Return what one reply may take at most."""
    return int(_usual()["reply_tokens"])


def usual_comparison() -> float:
    """Return dollars for one pair where no price by token is known."""
    return float(_usual()["comparison"])


@functools.cache
def _usual() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_USUAL.read_text(encoding="utf-8"))
    return found


def _file() -> Path:
    return place("state") / "judge-prices.json"


def _kept() -> dict[str, tuple[float, float]]:
    try:
        found = json.loads(_file().read_text(encoding="utf-8"))
        return {str(name): (float(pair[0]), float(pair[1])) for name, pair in found.items()}
    except (OSError, ValueError, TypeError, AttributeError, IndexError):
        return {}
