"""How far a long look at data is, and the wish to end it: for the command line, and for the wizard while it starts a run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from qlora_tui.engine.text import one_line
from qlora_tui.engine.units import count, gib
from qlora_tui.tui.printer import Output

_BAR = 24
_LINE_EVERY_SECONDS = 10.0
_DRAWN_EVERY_SECONDS = 0.2
_AFTER_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Reading:
    """What somebody who waits is told, as a share done (None where nobody knows) and in words; `stopping` raises to end the waiting."""

    say: Callable[[float | None, str], object] = lambda share, text: None
    stopping: Callable[[], None] = lambda: None

    def progress(self, done: int, total: int) -> None:
        """Tell bytes of data read and bytes in all; 0 in all where nobody knows, and all of them once they are read."""
        if not total:
            self.say(None, "reading the data …")
        elif done < total:
            self.say(done / total, f"reading the data  {done * 100 // total} % of {gib(total)}")
        else:
            self.say(1.0, "checking the run …")

    def rows(self, doing: str, done: int, total: int) -> None:
        """Tell how many rows something was done with."""
        if total:
            self.say(done / total, f"{doing}  {count(done)} of {count(total)} rows")


NOBODY = Reading()
"""Nobody waits, and nobody ends it."""


@contextmanager
def on_a_line(talk: Output) -> Iterator[Reading]:
    """Show a reading that takes a while on the terminal's line, and clear it; elsewhere say a line every ten seconds.

    Spaces clear it and no escape codes, so that it is right on any terminal.
    """
    due = time.monotonic() + (_AFTER_SECONDS if talk.terminal else _LINE_EVERY_SECONDS)
    width = 0

    def say(share: float | None, text: str) -> None:
        nonlocal due, width
        if (now := time.monotonic()) < due:
            return
        if not talk.terminal:
            due = now + _LINE_EVERY_SECONDS
            talk.line(text)
            return
        due = now + _DRAWN_EVERY_SECONDS
        width = min(78, shutil.get_terminal_size().columns - 1)
        bar = "" if share is None else f"[{'#' * round(min(1.0, share) * _BAR):<{_BAR}}] "
        talk.write(f"\r{(bar + one_line(text))[:width]:<{width}}")

    try:
        yield Reading(say)
    finally:
        if width:
            talk.write(f"\r{'':<{width}}\r")
