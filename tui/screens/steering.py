"""The wishes of one viewer: what is said when a key leaves one, and whether the run refused it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qlora_tui.engine.events import Command
from qlora_tui.engine.text import one_line

STEERS = ("save", "pause", "sample", "slower", "faster")
"""Actions of the run screen that leave a wish: offered while there is a run to hear it, and never to who only looks."""
_MOST = 64
_PROMISES = {
    "save": "a checkpoint will be saved at the next safe point",
    "pause": "pauses after this step: saves, and frees the device; p goes on",
    "resume": "goes on",
    "sample": "after this step the model shows what it answers now",
}
_WORDS = {"set": "learning rate", "save": "save", "pause": "pause", "resume": "go on", "sample": "sample", "stop": "stop", "abort": "abort"}


def promise(name: str, args: Mapping[str, Any] | None = None) -> str:
    """Return what a wish will do, and how it is taken back.

    >>> promise("set", {"key": "learning_rate", "factor": 0.5})
    'half the learning rate from the next step on; L takes it back'
    """
    if name != "set" or not args:
        return _PROMISES.get(name, f"{name} was asked for")
    half = float(args["factor"]) < 1
    return f"{'half' if half else 'double'} the learning rate from the next step on; {'L' if half else 'l'} takes it back"


class Waiting:
    """Remembers what this viewer asked; answers to other viewers are theirs."""

    def __init__(self) -> None:
        """Begin with nothing asked."""
        self._asked: dict[str, str] = {}

    def ask(self, id: str, name: str) -> None:
        """Remember the wish `id`; of many without an answer only the newest are kept."""
        self._asked[id] = name
        while len(self._asked) > _MOST:
            del self._asked[next(iter(self._asked))]

    def refused(self, answers: Iterable[Command]) -> list[str]:
        """Return a sentence for each wish of this viewer that `answers` refuse, once."""
        found = []
        for answer in answers:
            name = self._asked.pop(answer.id, "")
            if name and not answer.obeyed:
                found.append(f"{_WORDS.get(name, name)}: {one_line(answer.why, limit=200) or 'refused'}")
        return found
