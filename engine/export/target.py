"""What an export is asked for, what it works with, and what every target must be able to say; one file a target tells it.

Nothing here loads torch: a command line, and the checks before a run, ask targets what they need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tui.engine.data import Chat, TokenRow
from qlora_tui.engine.errors import Problem
from qlora_tui.engine.export.room import Room
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.spec import RunConfig

F16, Q8_0 = "f16", "q8_0"
RECORD = "export.json"
"""In every exported folder: what it is, from what it was made, and how it was proved."""

Look = Callable[[], None]
"""Called between parts of the work; raises to end it."""
Note = Callable[[int, int, str], None]
"""Gets what is done, of how much, and what it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A run that left an adapter, read back: what was trained, and the 16-bit base that it belongs to.

    `base` holds the original weights, `commit` is the hub's where they came from one.
    """

    folder: Path
    run: RunConfig
    base: Path
    commit: str
    spec: ModelSpec

    @property
    def adapter(self) -> Path:
        """The folder of the adapter."""
        return self.folder / "adapter"


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows that an export is proved on: their tokens, the chats they were made from, and what they are, in words.

    `stop` is the token that ends an answer as it was trained; None where answers end in no token of their own.
    """

    tokens: Sequence[TokenRow]
    chats: Sequence[Chat]
    name: str
    stop: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One export under way: `folder` is filled under a name of its own, `spare` is for what is gone afterwards."""

    source: Source
    folder: Path
    spare: Path
    kind: str
    rows: Rows
    room: Room
    look: Look
    note: Note


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """An exported folder as somebody would use it.

    `losses` gives nats a supervised token for each row, by the program called `engine`. `prompts` gives, for each chat, the tokens
    that an answer begins after, or None where this way of serving knows nothing of such chats. `stops` are the tokens that end an answer,
    `faults` what shows without asking the engine.
    """

    engine: str
    losses: Callable[[Sequence[TokenRow]], list[float]]
    prompts: Callable[[Sequence[Chat]], list[list[int] | None]]
    stops: frozenset[int]
    notes: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One form of export.

    `kinds` are the types of weights to choose from, the usual one first. `problems` says what stands in its way, from the run and
    the small files of its model alone, so before a step is trained.
    `disk` gives the bytes it writes, scratch included, of a model whose weights take so many. `write` fills a folder, `serve`
    opens what lies there for the parity gate, and `use` gives the one command
    that starts what lies in a folder.
    """

    name: str
    about: str
    kinds: tuple[str, ...] = ()
    problems: Callable[[RunConfig, ModelSpec, Path, str], list[Problem]]
    disk: Callable[[ModelSpec, int, str], int]
    write: Callable[[Work], None]
    serve: Callable[[Work], Served]
    use: Callable[[Source, Path, str], str]


Json = Mapping[str, Any]
