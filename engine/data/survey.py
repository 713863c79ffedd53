"""How long rows are and where their answers begin: one entry a row, kept while they are rendered.

It answers what a limit would do before anybody trains with it: how many rows are longer, how many lose their whole answer.
"""

from __future__ import annotations

import itertools
import json
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qlora_tui.engine.data.ahead import rendered
from qlora_tui.engine.data.chat import Refusal, Row
from qlora_tui.engine.data.render import Renderer, TokenRow
from qlora_tui.engine.data.tape import Stopping, polled
from qlora_tui.engine.errors import BadRow

_LIMITS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
_NARROWEST = 16
_KEPT_PERCENT = 99


@dataclass(slots=True)
class Survey:
    """Of every row that could be rendered: its tokens, how many are trained, and the first of them; and the rows refused."""

    lengths: array[int] = field(default_factory=lambda: array("i"))
    supervised: array[int] = field(default_factory=lambda: array("i"))
    first: array[int] = field(default_factory=lambda: array("i"))
    refused: list[Refusal] = field(default_factory=list)

    def add(self, row: TokenRow) -> None:
        """Take one rendered row, before anything of it is cut."""
        self.lengths.append(len(row.input_ids))
        self.supervised.append(row.trained.count(1))
        self.first.append(row.trained.find(1))

    def refuse(self, row: Row, error: BadRow) -> None:
        """Take one row that cannot be rendered."""
        self.refused.append(Refusal(row.number, row.line, error.field, str(error)))

    @property
    def rows(self) -> int:
        """Return how many rows were looked at."""
        return len(self.lengths) + len(self.refused)

    def columns(self, stopping: Stopping = lambda: None) -> dict[str, bytes]:
        """Return it as bytes, to be kept; `stopping` raises to interrupt."""
        refused = "".join(f"{json.dumps(asdict(refusal))}\n" for refusal in polled(self.refused, stopping)).encode()
        each = {"lengths": self.lengths, "supervised": self.supervised, "first": self.first}
        return {**{name: numbers.tobytes() for name, numbers in each.items()}, "refused": refused}

    @classmethod
    def read(cls, columns: Mapping[str, memoryview]) -> Survey:
        """Return what `columns` gave."""
        lengths, supervised, first = (array("i", bytes(columns[name])) for name in ("lengths", "supervised", "first"))
        return cls(lengths, supervised, first, [Refusal(**json.loads(line)) for line in bytes(columns["refused"]).splitlines()])

    def tokens(self) -> dict[str, int]:
        """Return percentiles of the lengths and sums."""
        ordered = sorted(self.lengths)
        return {
            **{f"p{share}": percentile(ordered, share) for share in (50, 95, 99)},
            "max": ordered[-1] if ordered else 0,
            "total": sum(ordered),
            "supervised": sum(self.supervised),
        }

    def too_long(self, longest: int) -> dict[str, int]:
        """Return how many rows have more than `longest` tokens, and how many of them no trained token before that."""
        longer = [first for length, first in zip(self.lengths, self.first, strict=True) if length > longest]
        return {"rows": len(longer), "answer_lost": sum(first >= longest for first in longer)}

    def limits(self, longest: int) -> dict[str, Any]:
        """Return what some values of `max_length` would do, as shares of the rows, and the smallest that keeps 99 % whole."""
        ordered = sorted(self.lengths)
        most, rows = (ordered[-1] if ordered else 0), max(1, len(ordered))
        tried = sorted({longest, *(limit for limit in _LIMITS if limit < most)})
        lost = {limit: self.too_long(limit) for limit in tried}
        shares = [{"max_length": limit, **{name: count / rows for name, count in found.items()}} for limit, found in lost.items()]
        return {
            "max_length": longest,
            "lengths": [{"max_length": each["max_length"], "longer": each["rows"], "answer_lost": each["answer_lost"]} for each in shares],
            "keeps_99": percentile(ordered, _KEPT_PERCENT),
        }

    def histogram(self) -> list[dict[str, int]]:
        """Return the rows by length, as `histogram` does."""
        return histogram(sorted(self.lengths))


def histogram(ordered: Sequence[int]) -> list[dict[str, int]]:
    """Return rows by length, shortest first: bins from `low` to `high` tokens, two to a doubling, from the shortest to the longest.

    >>> histogram([10, 12, 20])
    [{'low': 1, 'high': 16, 'rows': 2}, {'low': 17, 'high': 24, 'rows': 1}]
    """
    if not ordered:
        return []
    edges = [0, _NARROWEST]
    while edges[-1] < ordered[-1]:
        edges.append(edges[-1] * 3 // 2 if edges[-1] & (edges[-1] - 1) == 0 else edges[-1] // 3 * 4)
    bins = [
        {"low": low + 1, "high": high, "rows": bisect_right(ordered, high) - bisect_right(ordered, low)}
        for low, high in itertools.pairwise(edges)
    ]
    return bins[bisect_left(edges, ordered[0]) - 1 :]


def survey(rows: Iterable[Row], renderer: Renderer, stopping: Stopping = lambda: None) -> Survey:
    """Render all rows and keep only their measures; `stopping` raises to interrupt."""
    found = Survey()
    for row, tokens in rendered(renderer, polled(rows, stopping), stopping):
        if isinstance(tokens, BadRow):
            found.refuse(row, tokens)
        else:
            found.add(tokens)
    return found


def percentile(ordered: Sequence[int], share: int) -> int:
    """Return the smallest length that `share` percent of the rows do not exceed.

    >>> percentile([1, 2, 3, 4], 50)
    2
    """
    return ordered[max(0, -(-len(ordered) * share // 100) - 1)] if ordered else 0
