"""What people ask of a run, from two sides: signals to this process, and lines that viewers leave on disk.

Signal handlers may only set plain attributes (a lock taken in a handler can wait for itself for ever), so `ask`
does just that; everything else happens on the owner thread, when the loop polls.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

from qlora_tui.engine.events import Command, Wish, WishName
from qlora_tui.engine.journal import COMMANDS, Inbox

KNOWN = frozenset(get_args(WishName))
_URGENT = ("stop", "abort")


class Asked:
    """The loop's view of wishes; a look costs one `stat` while nobody asks for anything."""

    def __init__(self, folder: Path, attempt: int, answer: Callable[[Command], object]) -> None:
        """Start at the end of what earlier attempts were asked; `answer` journals the reply to each wish."""
        self._path = folder / COMMANDS
        self._inbox = Inbox(folder)
        self._size = self._now()
        self._attempt = attempt
        self._answer = answer
        self._waiting: list[Wish] = []
        self._signal = ""
        self._signal_cause = ""
        self._told = ""
        self._urgent: str | None = None
        self.cause = ""

    def ask(self, name: str, cause: str) -> None:
        """Wish `name` ("stop" or "abort") from a signal handler: two assignments and nothing else."""
        self._signal_cause = cause
        self._signal = name

    @property
    def asked(self) -> bool:
        """Say whether a stop or abort was asked for, also when the loop has not looked yet."""
        return bool(self._signal or self._urgent)

    def urgent(self) -> str | None:
        """Return "stop" or "abort" once asked for; polled inside every long loop."""
        self._poll()
        return self._urgent

    def take(self) -> list[Wish]:
        """Return the wishes that wait for a safe point; whoever takes one answers it, since only there it shows whether it can be."""
        self._poll()
        taken, self._waiting = self._waiting, []
        return taken

    def close(self, why: str) -> None:
        """Refuse what still waits: the run is over and nobody will look again."""
        self._poll()
        for wish in self._waiting:
            self._answer(Command(wish.id, wish.name, obeyed=False, why=why))
        self._waiting = []

    def _poll(self) -> None:
        if self._signal and self._signal != self._told:
            self._told = self._signal
            self._press(Wish("", 0.0, self._attempt, self._signal), self._signal_cause)
        if (size := self._now()) != self._size:
            self._size = size
            for wish in self._inbox.take():
                self._read(wish)

    def _read(self, wish: Wish) -> None:
        if wish.attempt not in (0, self._attempt):
            self._answer(Command(wish.id, wish.name, obeyed=False, why=f"it was meant for attempt {wish.attempt}; this is {self._attempt}"))
        elif wish.name in _URGENT:
            self._press(wish, "a viewer")
        elif wish.name in KNOWN:
            self._waiting.append(wish)
        else:
            self._answer(Command(wish.id, wish.name, obeyed=False, why="this version does not know that wish"))

    def _press(self, wish: Wish, cause: str) -> None:
        """Take note of a stop or abort; an abort outranks a stop, never the other way round."""
        if self._urgent != "abort":
            self._urgent, self.cause = wish.name, cause
        self._answer(Command(wish.id, wish.name, obeyed=True, why=f"asked by {cause}"))

    def _now(self) -> int:
        try:
            return self._path.stat().st_size
        except OSError:
            return 0
