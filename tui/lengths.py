"""How long the rows are in tokens: measured where the model's tokenizer lies on this disk, else guessed.

A guess from characters is enough for a first estimate of time, but how many rows are over `max_length` decides
what is trained on: people should see that before they start. No torch is loaded for it, and no network is asked.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tui.engine import builtin
from qlora_tui.engine.errors import BadRow, EngineError
from qlora_tui.engine.spec import RunConfig

if TYPE_CHECKING:
    from qlora_tui.engine.data import Renderer, Row

_CHARACTERS_A_TOKEN = 3.6
_ROW_OVERHEAD = 12
MOST_ROWS = 4000


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of the rows looked at, shortest first. `measured`: a tokenizer counted them; `whole`: of every row there is.

    `longest_chat` is the longest row with more than one answer.
    """

    tokens: tuple[int, ...] = ()
    measured: bool = False
    whole: bool = False
    longest_chat: int = 0

    @property
    def longest(self) -> int:
        """Return the tokens of the longest row."""
        return self.tokens[-1] if self.tokens else 0

    def over(self, limit: int) -> float:
        """Return the share of rows that have more than `limit` tokens.

        >>> Lengths((5, 8, 13, 21)).over(8)
        0.5
        """
        return 1 - bisect_right(self.tokens, limit) / len(self.tokens) if self.tokens else 0.0

    def mean(self, limit: int) -> float:
        """Return the mean of the rows that are not over `limit`, which are those trained on."""
        kept = self.tokens[: bisect_right(self.tokens, limit)]
        return sum(kept) / len(kept) if kept else 0.0

    def longest_trained(self, limit: int) -> int | None:
        """Return the tokens of the longest row that is kept at `limit`; None unless every row was counted."""
        kept = bisect_right(self.tokens, limit)
        return self.tokens[kept - 1] if kept and self.measured and self.whole else None


def guess(rows: Sequence[Row], most: int = MOST_ROWS) -> Lengths:
    """Return lengths of at most `most` rows, guessed from the number of characters."""
    return _lengths([(row, _guessed(row)) for row in _spread(rows, most)])


def measure(rows: Sequence[Row], run: RunConfig, most: int = MOST_ROWS) -> Lengths | None:
    """Return lengths of at most `most` rows, counted by the model's tokenizer; None where it cannot be read on this disk."""
    from qlora_tui.engine import data

    folder = tokenizer_folder(run)
    if folder is None or not rows:
        return None
    try:
        renderer = data.Renderer(data.load_tokenizer(folder, run.chat_template), mask_history=run.mask_history)
    except EngineError:  # the run itself will say so; an estimate can do without
        return None
    found = [(row, length) for row in _spread(rows, most) if (length := _measured(renderer, row))]
    return _lengths(found, measured=True, whole=len(rows) <= most) if found else None


def _lengths(found: list[tuple[Row, int]], *, measured: bool = False, whole: bool = False) -> Lengths:
    chats = [length for row, length in found if sum(turn.role == "assistant" for turn in row.chat.turns) > 1]
    return Lengths(tuple(sorted(length for _, length in found)), measured, whole, max(chats, default=0))


def tokenizer_folder(run: RunConfig) -> Path | None:
    """Return where the tokenizer of the run's model lies: a folder, the demo's model, or the hub's cache."""
    name = run.model_name_or_path
    if name == builtin.NAME:
        files = builtin.small_files()
        return files.folder if files.complete else None
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder
    found = list((hub_cache() / f"models--{name.replace('/', '--')}").glob("snapshots/*/tokenizer.json"))
    return max(found, key=lambda path: path.stat().st_mtime).parent if found else None


def hub_cache() -> Path:
    """Return where the hub's library keeps what it fetched."""
    if os.environ.get("HF_HUB_CACHE"):
        return Path(os.environ["HF_HUB_CACHE"]).expanduser()
    home = os.environ.get("HF_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".cache" / "huggingface") / "hub"


def _spread(rows: Sequence[Row], most: int) -> list[Row]:
    """Return at most `most` rows, spread evenly: large data must not take minutes."""
    return [rows[index * len(rows) // min(len(rows), most)] for index in range(min(len(rows), most))]


def _guessed(row: Row) -> int:
    characters = sum(len(turn.content) for turn in row.chat.turns)
    return int(characters / _CHARACTERS_A_TOKEN) + _ROW_OVERHEAD * len(row.chat.turns)


def _measured(renderer: Renderer, row: Row) -> int:
    try:
        return len(renderer.tokens(row).input_ids)
    except BadRow:
        return 0


def share(part: float) -> str:
    """Return a share that is not nothing as a percentage that is not nothing.

    >>> share(0.031), share(0.0004), share(0.27)
    ('3.1 %', 'under 0.1 %', '27 %')
    """
    if part < 0.001:
        return "under 0.1 %"
    return f"{part * 100:.1f} %" if part < 0.1 else f"{part * 100:.0f} %"
