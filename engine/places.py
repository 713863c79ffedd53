"""Where things live on this machine, and how files there are replaced.

XDG folders: cache (downloads, converted models), state (wizard draft, list of runs), config (the user's
defaults). `QLORA_TUI_HOME` puts all three in one folder, which is how tests stay out of a real home.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_XDG = {"cache": ("XDG_CACHE_HOME", ".cache"), "state": ("XDG_STATE_HOME", ".local/state"), "config": ("XDG_CONFIG_HOME", ".config")}


def place(kind: str) -> Path:
    """Return the `cache`, `state` or `config` folder, not yet made."""
    home = os.environ.get("QLORA_TUI_HOME")
    if home:
        return Path(home).expanduser() / kind
    variable, fallback = _XDG[kind]
    root = os.environ.get(variable)
    return (Path(root) if root else Path.home() / fallback) / "qlora-tui"


def replace_file(path: Path, content: str | bytes) -> None:
    """Write `content` beside `path` and rename it over, so that a reader sees the old or the new file, never half.

    The file is private (0600) and on disk before the rename: a power cut leaves one of the two versions.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`.lock: two processes never rewrite one file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
