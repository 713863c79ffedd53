"""Rows as they will be trained, one at a time: what the preview shows."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_tui.engine.errors import BadRow

if TYPE_CHECKING:
    from qlora_tui.engine.data import Piece, Renderer, Row


@dataclass(frozen=True, slots=True)
class WrittenRow:
    """One row, written out: its place in the file, its tokens, how many are trained, and its pieces; or why it is refused."""

    number: int
    tokens: int = 0
    trained: int = 0
    pieces: tuple[Piece, ...] = ()
    fault: str = ""


class WrittenRows:
    """The usable rows of a dataset, written out when they are asked for; threads may ask, one is answered at a time."""

    def __init__(self, rows: Sequence[Row], renderer: Renderer) -> None:
        """Write `rows` with `renderer`, which nobody else may use."""
        self._rows, self._renderer = rows, renderer
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return how many rows there are."""
        return len(self._rows)

    def at(self, place: int) -> WrittenRow:
        """Return the row at `place`, counted from 0."""
        from qlora_tui.engine.data import pieces

        row = self._rows[place]
        with self._lock:
            try:
                found = self._renderer.tokens(row)
            except BadRow as error:
                return WrittenRow(row.number, fault=str(error))
            return WrittenRow(row.number, len(found.input_ids), found.trained.count(1), tuple(pieces(found, self._renderer.tokenizer)))
