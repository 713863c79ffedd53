"""An imported run as `run.toml`: where a value was changed, the reason stands above it; at the end stands what is not followed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from qlora_tui.engine.errors import ConfigError, SpaceError
from qlora_tui.engine.foreign.ledger import HARMLESS, Entry, Imported
from qlora_tui.engine.foreign.source import shown
from qlora_tui.engine.preset import to_toml
from qlora_tui.engine.text import one_line


def text_of(made: Imported, name: str) -> str:
    """Return the file: every key, with a remark where a value was changed or taken for granted by the tool."""
    remarks = {entry.key: f"{made.tool}: {entry.why}" for entry in made.defaults}
    for entry in made.changed:
        remarks[entry.key] = f"changed from {entry.source} = {entry.shown}: {entry.why}"
    head = [f"# Imported from {one_line(name)} ({made.tool}).", *(f"# {one_line(note)}" for note in made.notes)]
    lost = [f"# {one_line(line_of(entry))}" for entry in made.dropped if entry.effect != HARMLESS]
    end = ["", "# Not followed, and it may change the result:", *lost] if lost else []
    return "\n".join([*head, "", to_toml(made.run, remarks).rstrip(), *end]) + "\n"


def line_of(entry: Entry) -> str:
    """Return one entry of a list as a line: what stood there, what it is now, and why."""
    was = f"{entry.source} = {entry.shown}" if entry.source else ""
    now = f"{entry.key} = {shown(entry.key, list(entry.to) if isinstance(entry.to, tuple) else entry.to)}" if entry.key else ""
    said = " -> ".join(part for part in (was, now) if part)
    return f"{said}: {entry.why}" if entry.why else said


def write(text: str, path: Path, *, force: bool = False) -> None:
    """Write `text` to `path`, whole or not at all; a file that is there stays, unless `force`.

    Raises:
        ConfigError: there is one already.
        SpaceError: it cannot be written.
    """
    where = one_line(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=".import-")
    except (OSError, ValueError) as error:
        raise SpaceError(f"it cannot be written ({one_line(error, limit=120)})", where=where) from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if force:
            Path(part).replace(path)
        else:
            os.link(part, path)  # fails where there is one, in one instant
    except FileExistsError:
        raise ConfigError("there is a file of this name already", hint="name another with --out, or say --force", where=where) from None
    except OSError as error:
        raise SpaceError(f"it cannot be written ({error.strerror})", where=where) from None
    finally:
        Path(part).unlink(missing_ok=True)
