"""The list of runs: folders on disk, each with its own state; no database that could disagree with them.

A run's state is read, never remembered: the lock says whether a process holds it, the last lines of its journal
say how it ended, and a journal without a last word under a free lock means that it crashed.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from qlora_tui.engine.errors import ConfigError, JournalError, SpaceError
from qlora_tui.engine.events import Finished, Record, Started, Stepped, decode
from qlora_tui.engine.journal import COMMANDS, EVENTS, LOCK, is_running
from qlora_tui.engine.places import locked, place, replace_file
from qlora_tui.engine.spec import RunConfig, nearest

RUN_FILE = "run.toml"
LOG = "log.txt"
RUNNING, CRASHED = "running", "crashed"
_WRITTEN = (EVENTS, COMMANDS, LOCK, RUN_FILE, LOG, "report.md", "report.html", "checkpoints", "eval", "adapter")
_KNOWN_LIMIT = 200
_BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class RunInfo:
    """One run at a glance; `outcome` is empty until it finished, `loss` is of the last step."""

    id: str
    state: str
    step: int
    total_steps: int
    loss: float | None
    started: float | None
    path: Path
    outcome: str = ""


def list_runs(runs_dir: Path, *, everywhere: bool = False) -> list[RunInfo]:
    """Return the runs in `runs_dir`, newest first; `everywhere` adds those this user started in other folders."""
    folders = {folder.resolve(): folder for folder in _folders(runs_dir)}
    if everywhere:
        folders = {folder.resolve(): folder for folder in _known() if is_run(folder)} | folders
    return sorted((read_info(folder) for folder in folders.values()), key=lambda info: (info.started or 0.0, info.id), reverse=True)


def read_info(folder: Path) -> RunInfo:
    """Say how the run in `folder` stands, from the first and the last lines of its journal only."""
    running = is_running(folder)
    first, last = _ends(folder / EVENTS)
    attempt = last[-1].attempt if last else 0
    ended = next((record.event for record in last if record.attempt == attempt and isinstance(record.event, Finished)), None)
    step = next((record.event for record in reversed(last) if isinstance(record.event, Stepped)), None)
    outcome = ended.outcome if ended else ""
    return RunInfo(
        id=folder.name,
        state=RUNNING if running else outcome or CRASHED,
        step=step.step if step else 0,
        total_steps=step.total_steps if step else 0,
        loss=step.loss if step else None,
        started=first.t if first else None,
        path=folder,
        outcome=outcome,
    )


def find_run(text: str, runs_dir: Path) -> Path:
    """Return the folder of the run called `text`: an id, a path, or `last` (one that runs before one that ended).

    Raises:
        ConfigError: there is none; the nearest id is named.
    """
    if text == "last":
        return _last(runs_dir)
    for folder in (runs_dir / text, Path(text).expanduser()) if Path(text).name == text else (Path(text).expanduser(),):
        if is_run(folder):
            return folder
    known = [folder for folder in _known() if is_run(folder)]
    for folder in known:
        if folder.name == text:
            return folder
    names = [folder.name for folder in (*_folders(runs_dir), *known)]
    raise ConfigError(f"no run {text!r} in {runs_dir}", hint=nearest(text, names) or "qlora-tui runs lists them", where="RUN")


def new_run_folder(run: RunConfig, name: str) -> Path:
    """Make the private folder of a new run, such as `runs/20261125-164012-chat-8b`, and remember where it is.

    Raises:
        SpaceError: the runs folder cannot be made, or somebody else could swap what lies in it.
    """
    root = Path(run.runs_dir).expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpaceError(
            f"the runs folder cannot be made: {error.strerror}", where=str(root), hint="choose another with --runs-dir"
        ) from None
    _refuse_foreign(root)
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{slug(name)}"
    for number in range(1, 1000):
        folder = root / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(mode=0o700)  # fails on whatever lies there already, a planted link included
        except FileExistsError:
            continue
        except OSError as error:
            raise SpaceError(
                f"no run folder can be made: {error.strerror}", where=str(root), hint="choose another with --runs-dir"
            ) from None
        _remember(folder)
        return folder
    raise SpaceError("a thousand runs began within one second", where=str(root), hint="try again")


def claim(folder: Path) -> Path:
    """Check that an old run's folder is ours and real before anything is written into it.

    Raises:
        JournalError: the folder, or something that a run writes in it, is a link or belongs to somebody else.
    """
    for path in (folder, *(folder / name for name in _WRITTEN)):
        if not path.exists() and not path.is_symlink():
            continue
        facts = path.lstat()
        if stat.S_ISLNK(facts.st_mode) or facts.st_uid not in _ours():
            raise JournalError(
                f"{path.name} is a link or belongs to another user", where=str(folder), hint="name the real folder of your run"
            )
    return folder


def slug(name: str) -> str:
    """Return `name` as a part of a folder name: lower case letters, digits, dots and dashes.

    >>> slug("Qwen/Qwen3-8B")
    'qwen3-8b'
    """
    leaf = name.rstrip("/").rsplit("/", 1)[-1].lower()
    return re.sub(r"[^a-z0-9.]+", "-", leaf).strip("-.")[:40].strip("-.") or "run"


def is_run(folder: Path) -> bool:
    """Say whether `folder` holds a run."""
    try:
        return (folder / RUN_FILE).is_file() or (folder / EVENTS).is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _last(runs_dir: Path) -> Path:
    found = list_runs(runs_dir) or list_runs(runs_dir, everywhere=True)
    if not found:
        raise ConfigError(f"no run yet in {runs_dir}", hint="qlora-tui demo makes a first one", where="RUN")
    return next((info for info in found if info.state == RUNNING), found[0]).path


def _folders(runs_dir: Path) -> Iterator[Path]:
    try:
        inside = sorted(runs_dir.iterdir())
    except OSError:
        return
    yield from (folder for folder in inside if is_run(folder))


def _known_file() -> Path:
    return place("state") / "runs.txt"


def _known() -> list[Path]:
    try:
        return [Path(line) for line in _known_file().read_text(encoding="utf-8").splitlines() if line]
    except OSError:
        return []


def _remember(folder: Path) -> None:
    """Add `folder` to this user's list; losing the list costs convenience only, so a full disk is no reason to stop."""
    try:
        with locked(_known_file()):
            kept = [path for path in _known() if is_run(path)][-_KNOWN_LIMIT:]
            replace_file(_known_file(), "".join(f"{path}\n" for path in (*kept, folder.resolve())))
    except OSError:
        return


def _ours() -> set[int]:
    """Return the owners we trust: ourselves and root; root itself works in other people's folders (containers)."""
    return {os.getuid(), 0}


def _refuse_foreign(root: Path) -> None:
    if os.getuid() == 0:
        return
    owners = {root.lstat().st_uid, root.stat().st_uid}
    sticky = root.stat().st_mode & stat.S_ISVTX
    if owners - _ours() and not sticky:
        raise SpaceError(
            "the runs folder belongs to another user, who could swap what lies in it",
            where=str(root),
            hint="choose another with --runs-dir",
        )


def _ends(path: Path) -> tuple[Record | None, list[Record]]:
    """Return the first record and the last ones: enough of the file's end to hold the last step, if there is one."""
    try:
        with path.open("rb") as file:
            return decode(file.readline().decode("utf-8", "replace")), _last_records(file)
    except (OSError, JournalError):
        return None, []


def _last_records(file: IO[bytes]) -> list[Record]:
    size, block = file.seek(0, os.SEEK_END), _BLOCK
    while True:
        file.seek(max(0, size - block))
        last = _decode_all(file.read(block), whole=block >= size)
        if block >= size or any(isinstance(record.event, (Stepped, Started)) for record in last):
            return last
        block *= 4


def _decode_all(data: bytes, *, whole: bool) -> list[Record]:
    lines = data.split(b"\n")
    return [record for line in (lines if whole else lines[1:]) if (record := decode(line.decode("utf-8", "replace"))) is not None]
