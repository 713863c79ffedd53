"""Deleting runs with care: only what is a run, never one that runs, and never what a link points to.

A folder is moved aside by one rename and removed there, so that a kill in between leaves no half run in the list.
What such a kill left is cleared away by the next deletion.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from qlora_tui.engine.errors import ConfigError, SpaceError
from qlora_tui.engine.events import Started, decode
from qlora_tui.engine.journal import EVENTS, RunLock
from qlora_tui.engine.runs import LOG, RUN_FILE, claim
from qlora_tui.engine.text import one_line

CHECKPOINTS = "checkpoints"
_ASIDE = ".qlora-tui-deleted-"


@dataclass(frozen=True, slots=True)
class Doomed:
    """A run that may be deleted: its real folder, what goes (all of it, or a part), and how many bytes that is."""

    folder: Path
    target: Path
    bytes: int


def weigh(folder: Path, *, only_checkpoints: bool = False) -> Doomed:
    """Return what deleting the run in `folder` would take away; nothing is changed.

    Raises:
        ConfigError: `folder` is no run of ours, or a link to one.
        JournalError: something in it is a link or belongs to somebody else.
    """
    if folder.is_symlink():
        raise ConfigError("this is a link, not a run", hint="name the real folder; links are not followed", where=one_line(folder))
    real = folder.resolve()
    if not _is_ours(real):
        hint = f"only folders whose {EVENTS} a run has begun are deleted"
        raise ConfigError("this is no run", hint=hint, where=one_line(folder))
    target = claim(real) / CHECKPOINTS if only_checkpoints else real
    return Doomed(real, target, sum(_sizes(target)))


@contextmanager
def held(doomed: list[Doomed]) -> Iterator[None]:
    """Hold the locks of all these runs: none of them runs, and none can be started meanwhile.

    Raises:
        JournalError: one of them runs.
    """
    with ExitStack() as locks:
        for one in doomed:
            locks.callback(RunLock(one.folder).release)
        yield


def remove(doomed: Doomed) -> None:
    """Delete it; whoever calls holds its lock.

    Raises:
        SpaceError: it could not be moved aside (all of it is still there), or not all of it could be removed.
    """
    parent = doomed.target.parent
    _clear(parent)
    if not doomed.target.exists():
        return
    try:
        aside = Path(tempfile.mkdtemp(dir=parent, prefix=_ASIDE))
        doomed.target.rename(aside / doomed.target.name)
        with contextlib.suppress(FileNotFoundError):  # another deletion clears it away at the same time
            shutil.rmtree(aside)
    except OSError as error:
        told = f"it could not be deleted: {error.strerror or error}"
        raise SpaceError(told, where=one_line(doomed.target), hint=f"what was moved aside lies in {one_line(parent)}/{_ASIDE}*") from None


def _is_ours(folder: Path) -> bool:
    """Say whether a run wrote here: its journal begins with `started`, or it never began and left its settings and a log alone.

    A project's own folder may hold a file called run.toml; that makes it no run.
    """
    try:
        with (folder / EVENTS).open("rb") as file:
            first = decode(file.readline().decode("utf-8", "replace"))
        return first is not None and isinstance(first.event, Started)
    except FileNotFoundError:
        return (folder / RUN_FILE).is_file() and {path.name for path in folder.iterdir()} <= {RUN_FILE, LOG, "lock", "commands.jsonl"}
    except OSError:
        return False


def _sizes(folder: Path) -> Iterator[int]:
    """Yield the bytes of every file below `folder`; a link counts as itself."""
    for root, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(FileNotFoundError):  # a run that runs, and is refused later, removes checkpoints meanwhile
                yield os.lstat(os.path.join(root, name)).st_size  # noqa: PTH118  a Path a file costs ten times as much


def _clear(parent: Path) -> None:
    for left in parent.glob(f"{_ASIDE}*"):
        if not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
