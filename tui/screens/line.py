"""A line to type in that holds nothing but what can be shown, and completes paths: Textual would send pasted escapes on."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

from textual.suggester import Suggester
from textual.widgets import Input

from qlora_tui.engine.spec import BUILTIN
from qlora_tui.engine.text import one_line, safe_text

_MOST_NAMES = 20_000
"""Names of a folder that are looked at: the first of a larger one is as good a guess as any."""


class Line(Input):
    """An `Input` without control, bidi and format characters, whatever is pasted or set."""

    def validate_value(self, value: str) -> str:
        """Drop every character that would have to be escaped; called before each change of `value`."""
        return "".join(char for char in value if char.isprintable() and safe_text(char) == char)


class PathSuggester(Suggester):
    """Complete paths: the first file or folder that goes on from what is typed."""

    def __init__(self, builtin: str, *, folders: bool = False) -> None:
        """Complete `builtin` too, which is no path; only `folders` if asked. Looks again every time: files come and go."""
        super().__init__(use_cache=False, case_sensitive=True)
        self._builtin, self._folders = builtin, folders

    async def get_suggestion(self, value: str) -> str | None:
        """Return a longer path, or nothing; a folder may be large or far away, so it is read on a thread."""
        return await asyncio.to_thread(complete, value, self._builtin, folders=self._folders)


def complete(value: str, builtin: str, *, folders: bool = False) -> str | None:
    """Return the first path that begins with `value`, folders with a slash; hidden ones only when asked for."""
    if not value or value.startswith(BUILTIN):
        return builtin if value and builtin.startswith(value) else None
    return _on_disk(value, folders) or (builtin if builtin.startswith(value) else None)


def _on_disk(value: str, folders: bool) -> str | None:
    typed = Path(value).expanduser()
    folder, start = (typed, "") if value.endswith("/") else (typed.parent, typed.name)
    try:
        seen = itertools.islice(folder.iterdir(), _MOST_NAMES)
        names = sorted(path for path in seen if path.name.startswith(start) and (start or not path.name.startswith(".")))
        names = [path for path in names if path.is_dir()] if folders else names
    except OSError:
        return None
    if not names or not one_line(names[0].name, limit=300).isprintable() or one_line(names[0].name, limit=300) != names[0].name:
        return None
    found = names[0]
    return value[: len(value) - len(start)] + found.name + ("/" if found.is_dir() else "")
