"""Where things live on this machine, and how files there are replaced.

XDG folders: cache (downloads, converted models), state (wizard draft, list of runs), config (the user's
defaults). `QLORA_TUI_HOME` puts all three in one folder, which is how tests stay out of a real home.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PARTIAL, _ASIDE = ".partial-", ".aside-"
_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE of linux/fs.h, AT_FDCWD of fcntl.h
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
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
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
def published(target: Path) -> Iterator[Path]:
    """Lend a new private folder beside `target`; once it is filled it is on disk and `target` is its name, by one rename.

    An older `target` is exchanged for it in that same instant, so there is a complete one at every instant. Where the
    file system cannot exchange, the older one is set aside first, and `settle` puts it back after a kill in between.

    Raises:
        OSError: it could not be written; the older `target` is as it was, and nothing half-written stays.
    """
    settle(target.parent)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=_PARTIAL))
    try:
        yield folder
        _sync_all(folder)
        _take_place(folder, target)
        sync_folder(target.parent)
    finally:
        _remove(folder)


def settle(folder: Path) -> None:
    """Clear away what a kill left in `folder`: half-written parts go, and what was set aside gets its name back."""
    for part in folder.glob(f"{_PARTIAL}*"):
        _remove(part)
    for aside in folder.glob(f"{_ASIDE}*"):
        target = folder / aside.name.removeprefix(_ASIDE)
        if os.path.lexists(target):
            _remove(aside)
        else:
            aside.rename(target)


def discard(path: Path) -> None:
    """Remove a folder so that a kill in between leaves nothing that looks like it; what cannot be removed stays, hidden."""
    with contextlib.suppress(OSError):
        hidden = Path(tempfile.mkdtemp(dir=path.parent, prefix=_PARTIAL))
        path.rename(hidden / path.name)
        _remove(hidden)


def _take_place(folder: Path, target: Path) -> None:
    if not os.path.lexists(target):
        folder.rename(target)
        return
    if exchanged(folder, target):
        return
    aside = target.with_name(f"{_ASIDE}{target.name}")
    target.rename(aside)
    try:
        folder.rename(target)
    except OSError:
        aside.rename(target)
        raise
    _remove(aside)


def is_here(name: str | Path) -> bool:
    """Say whether `name` is on this disk; what no file can be called (too long, a user who is not) is not."""
    try:
        return Path(name).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def is_folder(name: str | Path) -> bool:
    """Say whether `name` is a folder on this disk; as `is_here`."""
    try:
        return Path(name).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):
        return False


def exchanged(one: Path, other: Path) -> bool:
    """Give two names each other's files in one instant; False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    return bool(rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0)


def _sync_all(folder: Path) -> None:
    """Make what lies below `folder` private whatever the umask, and put it on the disk: files first, then the folders that name them."""
    inside = sorted(folder.rglob("*"), reverse=True)
    for file in inside:
        if file.is_file():
            file.chmod(0o600)
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    for part in (*inside, folder):
        if part.is_dir():
            part.chmod(0o700)
            sync_folder(part)


def _remove(path: Path) -> None:
    """Remove a folder, or the link that lies in its place; one that resists stays where it is."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`.lock: two processes never rewrite one file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
