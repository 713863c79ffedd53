"""Prepared rows kept on disk, so that the next run, or a run beside this one, does not tokenize again.

An entry is a folder of columns with a checksum for each. It is built in a folder of its own and renamed, under a lock, so
that two runs never build the same and nobody reads half of one. A damaged entry is built anew. The key holds everything that
decides the tokens: the texts, the tokenizer and its template, the settings, and the code that made them.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import BinaryIO

from qlora_tui.engine.data.store import IDS, MASK, Columns, mapped
from qlora_tui.engine.places import place

MOST_BYTES = 8 * 2**30
"""All entries together; the ones not used for longest go first."""
_SUMS = "sums.json"
_BUILDING = ".building-"
_OLD_SECONDS = 86_400
_POLL_SECONDS = 0.1
_BLOCK_BYTES = 2**20

Build = Callable[[BinaryIO, BinaryIO], Mapping[str, bytes]]
"""Writes ids and masks into the two files and returns the other columns."""
Stopping = Callable[[], None]


def kept(key: str, build: Build, stopping: Stopping = lambda: None) -> Columns:
    """Return the columns of `key`, built by `build` where there are none or they are damaged.

    Where nothing can be written (a full disk, a home that is read-only) they are built in memory.
    """
    folder = place("cache") / "rows"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(folder / f".lock-{key[:2]}", stopping):
            found = _read(folder / key, stopping)
            if found is None:
                _write(folder, key, build, stopping)
                found = _read(folder / key, stopping)
        if found is not None:
            prune(folder, keep=key)
            return found
    except OSError:
        pass
    return _in_memory(build)


def key_of(*parts: object) -> str:
    """Return the name of an entry: a digest of `parts`, of this room's code and of the libraries that make the tokens."""
    return blake2b(json.dumps([_code(), *parts], default=str).encode(), digest_size=16).hexdigest()


def prune(folder: Path, keep: str = "", most: int | None = None) -> None:
    """Remove the entries used longest ago until all together are no larger than `most`, and what a killed process left."""
    entries = []
    for entry in folder.iterdir():
        with contextlib.suppress(OSError):
            if entry.name.startswith(_BUILDING) and time.time() - entry.stat().st_mtime > _OLD_SECONDS:
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.is_dir() and not entry.name.startswith("."):
                size = sum(file.stat().st_size for file in entry.iterdir())
                entries.append((entry.name == keep, entry.stat().st_mtime, size, entry))
    spare = (MOST_BYTES if most is None else most) - sum(size for _, _, size, _ in entries)
    for wanted, _, size, entry in sorted(entries, key=lambda each: each[:2]):
        if spare >= 0 or wanted:
            return
        shutil.rmtree(entry, ignore_errors=True)
        spare += size


def _read(entry: Path, stopping: Stopping) -> Columns | None:
    """Return the columns of an entry; None if there is none, or one that is not what was written."""
    try:
        sums = json.loads((entry / _SUMS).read_text(encoding="utf-8"))
        if any(_sum(entry / name, stopping) != said for name, said in sums.items()) or IDS not in sums:
            raise ValueError
        found = {name: mapped(entry / name) for name in sums}
        os.utime(entry)
    except FileNotFoundError:
        shutil.rmtree(entry, ignore_errors=True)
        return None
    except (ValueError, TypeError, AttributeError):
        shutil.rmtree(entry, ignore_errors=True)
        return None
    return found


def _write(folder: Path, key: str, build: Build, stopping: Stopping) -> None:
    fresh = Path(tempfile.mkdtemp(dir=folder, prefix=_BUILDING))
    try:
        with (fresh / IDS).open("wb", _BLOCK_BYTES) as ids, (fresh / MASK).open("wb", _BLOCK_BYTES) as mask:
            columns = build(ids, mask)
        for name, content in columns.items():
            (fresh / name).write_bytes(content)
        sums = {name: _sum(fresh / name, stopping) for name in (IDS, MASK, *columns)}
        (fresh / _SUMS).write_text(json.dumps(sums), encoding="utf-8")
        fresh.rename(folder / key)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _in_memory(build: Build) -> Columns:
    ids, mask = io.BytesIO(), io.BytesIO()
    columns = build(ids, mask)
    everything = {IDS: ids.getvalue(), MASK: mask.getvalue(), **columns}
    return {name: memoryview(content) for name, content in everything.items()}


def _sum(path: Path, stopping: Stopping) -> str:
    """Return the checksum of a file; read and not mapped, since mapped pages count as memory of this process."""
    state = blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            stopping()
            state.update(block)
    return state.hexdigest()


@contextmanager
def _locked(path: Path, stopping: Stopping) -> Iterator[None]:
    """Hold a lock that a wish to stop can interrupt the wait for: building may take another run minutes."""
    with path.open("a") as file:
        while True:
            stopping()
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_POLL_SECONDS)
        yield


@cache
def _code() -> str:
    """Return a digest of this room's source and of the versions of what renders and tokenizes."""
    state = blake2b(digest_size=16)
    for file in sorted(Path(__file__).parent.glob("*.py")):
        state.update(file.read_bytes())
    for name in ("qlora-tui", "tokenizers", "transformers", "jinja2"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            state.update(f"{name} {metadata.version(name)}".encode())
    return state.hexdigest()
