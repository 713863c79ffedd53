"""The answers of base and tuned, made in a process of their own: it can be stopped at once, and what it made stays.

The screen and the command read the run folder; the model is in the other process alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from qlora_tui.engine import child
from qlora_tui.engine.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EngineError,
    FetchError,
    JournalError,
    ModelError,
    SpaceError,
    WontFit,
)
from qlora_tui.engine.journal import is_running
from qlora_tui.engine.judge import ANSWER_TOKENS, USUAL_ROWS, Pairs, are_there, read_pairs
from qlora_tui.engine.runs import RUN_FILE
from qlora_tui.engine.text import one_line
from qlora_tui.tui.commands import ANSWERER

KINDS = (CheckpointError, ConfigError, DataError, FetchError, JournalError, ModelError, SpaceError, WontFit)
"""What the other process may end with, told by name."""

Say = Callable[[int, int], object]
Make = Callable[[Path, int, int, Say, Callable[[], bool]], None]


def check(folder: Path) -> None:
    """Check that the run in `folder` is over: one that trains changes what would be compared, and needs the device itself.

    Raises:
        ConfigError: it has no config of its own.
        JournalError: it is running.
    """
    name = one_line(folder.name)
    if is_running(folder):
        raise JournalError(f"run {name} is running", hint="its answers can be judged once it has ended", where="RUN")
    if not (folder / RUN_FILE).is_file():
        raise ConfigError(f"run {name} has no {RUN_FILE}", hint="it cannot be loaded again", where="RUN")


def wanted(pairs: Pairs, rows: int, tokens: int) -> tuple[int, int]:
    """Return how many prompts and tokens to ask for: what was said, else as the last time, else the usual."""
    known = pairs.sheet
    return rows or (known.rows if known else USUAL_ROWS), tokens or (known.tokens if known else ANSWER_TOKENS)


def make(folder: Path, rows: int, tokens: int, say: Say, stopping: Callable[[], bool]) -> None:
    """Have the answers made that are missing; where none is, nothing is loaded to find that out.

    Args:
        folder: the run.
        rows: how many prompts.
        tokens: where an answer is cut off.
        say: hears answered prompts, and how many there will be (0: the model is still being loaded), several times a second.
        stopping: asked several times a second; true ends it.

    Raises:
        Stopped: `stopping()` became true; the answers that were finished are kept.
        EngineError: it could not be done, in the other process's own words.
    """
    if are_there(folder, rows, tokens):
        say(*counts(folder))
        return
    command = [sys.executable, "-P", "-m", "qlora_tui.tui", ANSWERER, str(folder.resolve()), str(rows), str(tokens)]
    before = counts(folder)

    def look() -> None:
        done, total = counts(folder)
        say(done, 0 if (done, total) == before else total)

    ended = child.run(command, doing="the answers were made", stopping=stopping, watch=look)
    child.raise_why(ended, *KINDS)
    if ended.code:
        raise EngineError(f"the answers could not be made: {ended.last_words}")
    say(*counts(folder))


def counts(folder: Path) -> tuple[int, int]:
    """Return how many prompts are answered, and how many were last asked for."""
    pairs = read_pairs(folder)
    return len(pairs.answers), pairs.sheet.rows if pairs.sheet else 0
