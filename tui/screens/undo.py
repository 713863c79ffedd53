"""Changes that can be taken back, one after the other."""

from __future__ import annotations

import dataclasses

from qlora_tui.engine.spec import RunConfig, values_of
from qlora_tui.engine.values import Value

MOST = 100
"""Changes remembered: more than anybody takes back by hand."""


class Undo:
    """Remembers of each change only the keys it touched, so that what was chosen on another page meanwhile stays."""

    def __init__(self) -> None:
        """Begin with nothing to take back."""
        self._changes: list[tuple[str, dict[str, Value]]] = []

    def __len__(self) -> int:
        return len(self._changes)

    def note(self, before: RunConfig, after: RunConfig, group: str = "") -> None:
        """Remember a change.

        Args:
            before: the run as it was.
            after: the run as it is now.
            group: names what belongs together, such as the digits typed into one field: it is taken back as one.
        """
        old, new = values_of(before), values_of(after)
        touched = {name: value for name, value in old.items() if new[name] != value}
        if not touched or (group and self._changes and self._changes[-1][0] == group):
            return
        self._changes = [*self._changes, (group, touched)][-MOST:]

    def back(self, run: RunConfig) -> RunConfig:
        """Return `run` without the last change; as it is where there is none."""
        if not self._changes:
            return run
        _, touched = self._changes.pop()
        return dataclasses.replace(run, **touched)  # type: ignore[arg-type]  # values that this run had

    def forget(self) -> None:
        """Forget all changes: another beginning was chosen."""
        self._changes.clear()
