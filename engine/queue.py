"""The queue: runs that wait for the one card, in one file that a kill at any instant leaves whole.

The file is replaced under a lock for every change, so adding while another process works through it is safe. Whoever
works through it holds a second lock: there is one runner at a time, and a file alone never says that something runs.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from qlora_tui.engine.errors import ConfigError, ExitCode, JournalError
from qlora_tui.engine.places import locked, place, replace_file
from qlora_tui.engine.spec import RunConfig, find_key, from_values, values_of
from qlora_tui.engine.text import one_line
from qlora_tui.engine.values import read_value

_VERSION = 1
_KEPT = 50
_ASKED_SECONDS = 0.01
_WORST_LAST = (ExitCode.DONE, ExitCode.TERMINATED, ExitCode.INTERRUPTED, ExitCode.USAGE, ExitCode.WILL_NOT_FIT, ExitCode.DIVERGED)
State = Literal["waiting", "running", "ended"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One run of the queue. `folder` is empty until it began; one that waits and has a folder goes on there."""

    id: int
    name: str
    run: RunConfig
    added: float
    state: State = "waiting"
    folder: str = ""
    outcome: str = ""
    exit_code: int | None = None


def entries() -> list[Entry]:
    """Return the queue, first come first; runs that ended stay in it until they are removed, the last fifty of them.

    Raises:
        ConfigError: the file cannot be read, or another version of this program wrote it.
    """
    return _read()[1]


def add(run: RunConfig, name: str, folder: Path | None = None) -> Entry:
    """Put a run at the end, and return it; `folder` is that of a run to go on with."""
    with _edited() as (numbers, found):
        entry = Entry(numbers["next"], one_line(name, limit=60), run, round(time.time(), 3), folder=str(folder.resolve()) if folder else "")
        numbers["next"] += 1
        found.append(entry)
    return entry


def remove(ids: list[int]) -> list[Entry]:
    """Take runs out of the queue and return them; their folders stay.

    Raises:
        ConfigError: one of them is not there, or it runs; then none is taken out.
    """
    with _edited() as (_, found):
        by_id = {entry.id: entry for entry in found}
        for wanted in ids:
            if wanted not in by_id:
                raise ConfigError(f"no run {wanted} in the queue", hint="qlora-tui queue lists them", where="ID")
            if by_id[wanted].state == "running" and runner_pid() is not None:
                raise ConfigError(f"run {wanted} is running", hint="qlora-tui queue stop stops and saves it", where="ID")
        found[:] = [entry for entry in found if entry.id not in ids]
    return [by_id[wanted] for wanted in dict.fromkeys(ids)]


def take() -> Entry | None:
    """Return the next run to work on, from now on marked as running; one that a killed runner left comes first. None: all are done."""
    with _edited() as (_, found):
        ready = [entry for entry in found if entry.state == "running"] + [entry for entry in found if entry.state == "waiting"]
        if not ready:
            return None
        taken = dataclasses.replace(ready[0], state="running")
        _put(found, taken)
    return taken


def note(entry: Entry, **changes: Any) -> Entry:
    """Write down what became of a run; one that was removed meanwhile stays removed."""
    changed = dataclasses.replace(entry, **changes)
    with _edited() as (_, found):
        _put(found, changed)
    return changed


def worst(codes: list[int]) -> int:
    """Return the exit code that says most of several: any failure, then diverged, does not fit, usage, stopped; 0 if all are done.

    >>> worst([0, 3, 1, 130]), worst([0, 130]), worst([])
    (1, 130, 0)
    """
    known = [int(code) for code in _WORST_LAST]
    return max(codes, key=lambda code: known.index(code) if code in known else len(known), default=0)


@contextmanager
def runner() -> Iterator[None]:
    """Be the one who works through the queue; the system ends that with the process, however it ends.

    Raises:
        JournalError: another process is; its number is named.
    """
    path = _runner_file()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "a+", encoding="ascii") as file:
        _hold(file)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _hold(file: IO[str]) -> None:
    """Take the runner's lock; whoever only asks who runs holds it for a moment too, and that is waited for."""
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pid = runner_pid()
        if pid is not None:
            hint = "what you add is run when its turn comes; qlora-tui queue stop ends it"
            raise JournalError(f"process {pid or '?'} works through the queue already", hint=hint)
        time.sleep(_ASKED_SECONDS)


def runner_pid() -> int | None:
    """Return the process that works through the queue, or None; asking never takes the lock from it."""
    try:
        with _runner_file().open("r", encoding="ascii") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return int(file.read() or 0)
    except (OSError, ValueError):
        return None
    return None


def _file() -> Path:
    return place("state") / "queue.json"


def _runner_file() -> Path:
    return place("state") / "queue-runner.lock"


def _put(found: list[Entry], changed: Entry) -> None:
    found[:] = [changed if entry.id == changed.id else entry for entry in found]


@contextmanager
def _edited() -> Iterator[tuple[dict[str, int], list[Entry]]]:
    """Lend the queue for one change, written when the block ends well."""
    path = _file()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(path):
        number, found = _read()
        numbers = {"next": number}
        yield numbers, found
        ended = [entry.id for entry in found if entry.state == "ended"][:-_KEPT]
        kept = [_to_json(entry) for entry in found if entry.id not in ended]
        replace_file(path, json.dumps({"v": _VERSION, "next": numbers["next"], "entries": kept}, indent=1))


def _read() -> tuple[int, list[Entry]]:
    path = _file()
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["v"] != _VERSION:
            raise ConfigError("another version of qlora-tui wrote the queue", hint="update qlora-tui", where=one_line(path))
        return int(raw["next"]), [_from_json(entry) for entry in raw["entries"]]
    except FileNotFoundError:
        return 1, []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        told = f"the queue cannot be read: {type(error).__name__}"
        raise ConfigError(told, hint="move the file away to begin a new one", where=one_line(path)) from None


def _to_json(entry: Entry) -> dict[str, Any]:
    return {field.name: getattr(entry, field.name) for field in dataclasses.fields(entry)} | {"run": values_of(entry.run)}  # own fields


def _from_json(raw: Mapping[str, Any]) -> Entry:
    run = from_values({name: read_value(find_key(name), value) for name, value in raw["run"].items()})
    return Entry(**{field.name: raw[field.name] for field in dataclasses.fields(Entry) if field.name in raw} | {"run": run})
