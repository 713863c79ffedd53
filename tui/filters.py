"""What the filters cost: rows that are left out and the tokens in them. Each is a figure over the rows looked at, scaled to all."""

from __future__ import annotations

from typing import NamedTuple

from qlora_tui.engine.spec import RunConfig
from qlora_tui.tui.datalook import DataLook
from qlora_tui.tui.scoring import Scored


class Cost(NamedTuple):
    """Rows left out (or cut), and the tokens that are not trained for it."""

    rows: int = 0
    tokens: int = 0

    def words(self, *, about: bool = True) -> str:
        """Return the cost as people read it.

        >>> Cost(1, 1204).words(), Cost(34, 71000).words(about=False)
        ('about 1 row with 1,204 tokens', '34 rows with 71,000 tokens')
        """
        rows = f"{self.rows:,} row{'' if self.rows == 1 else 's'} with {self.tokens:,} tokens"
        return f"about {rows}" if about else rows


def too_long(look: DataLook, run: RunConfig) -> Cost:
    """Return what the limit costs: whole rows where they are dropped, what is over it where they are cut; a split loses nothing."""
    lengths = look.lengths
    if not lengths.tokens or run.too_long == "split":
        return Cost()
    over = [length for length in lengths.tokens if length > run.max_length]
    lost = sum(over) if run.too_long == "drop" else sum(over) - len(over) * run.max_length
    return _scaled(len(over), lost, look)


def copies(look: DataLook, kind: str) -> Cost:
    """Return what leaving copies out costs, or would; `kind` is `exact` or `near`. Copies are taken to be as long as other rows."""
    exact, near, among = look.copies
    found = exact + (near if kind == "near" else 0)
    share = look.rows / among if among else 0.0
    return Cost(round(found * share), round(found * share * _mean(look)))


def known(look: DataLook, run: RunConfig, scored: Scored | None) -> Cost:
    """Return what leaving out answers that the base knows costs; nothing while the filter is off or nobody asked the base."""
    if scored is None or not run.perplexity_filter:
        return Cost()
    gone = scored.gone(run)
    return Cost(gone, round(gone * _mean(look)))


def _mean(look: DataLook) -> float:
    return sum(look.lengths.tokens) / len(look.lengths.tokens) if look.lengths.tokens else 0.0


def _scaled(rows: int, tokens: int, look: DataLook) -> Cost:
    share = look.rows / len(look.lengths.tokens)
    return Cost(round(rows * share), round(tokens * share))
