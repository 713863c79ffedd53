"""Events and wishes on disk: two append-only files, one each way, and the lock that says who owns a run.

No pipe breaks when a viewer dies, attaching is reading from the top, and a bug report is a file.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from qlora_tui.engine.errors import JournalError
from qlora_tui.engine.events import FORMAT_VERSION, Event, Finished, Record, Saved, Wish, decode, encode

EVENTS = "events.jsonl"
COMMANDS = "commands.jsonl"
LOCK = "lock"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says when a disk, a quota or a limit on files is full."""
_HELD_BYTES = 16 * 2**20  # some ten hours of steps
_BLOCK = 1 << 16
_TRIES = 25
_BETWEEN_SECONDS = 0.02


class Journal:
    """The writing end of `events.jsonl`: whole lines through one lock, numbered across attempts.

    The owner thread and the device sampler both write; the main thread may write the last word when it has to
    end the process. Each line goes to the system at once, fsynced only where a person relies on it (`saved`, `finished`).
    On a full disk lines wait in memory and go first once there is room: a run must not end because it cannot talk.
    """

    def __init__(self, folder: Path) -> None:
        """Open the journal of `folder` for a new attempt, cutting off a line that a crash left torn."""
        self.path = folder / EVENTS
        past = last_record(self.path)
        self.attempt = past.attempt + 1 if past else 1
        self._seq = past.seq if past else 0
        self._lock = threading.Lock()
        _cut_torn_line(self.path)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._waiting = bytearray()
        self._open = True
        self.finished = False

    def write(self, event: Event) -> Record | None:
        """Append `event`; after `Finished`, or once closed, nothing more is written and None is returned."""
        with self._lock:
            if self.finished or not self._open:
                return None
            self._seq += 1
            record = Record(self.attempt, self._seq, round(time.time(), 3), event)
            self._waiting += encode(record).encode("ascii") + b"\n"
            self._put()
            self.finished = isinstance(event, Finished)
            if isinstance(event, (Saved, Finished)):
                os.fsync(self._file)
            return record

    def _put(self) -> None:
        """Write what waits; a line that the disk took in part is completed by the next call.

        Raises:
            OSError: anything but a full disk, or so much waits that holding more would cost too much memory.
        """
        try:
            while self._waiting:
                del self._waiting[: os.write(self._file, self._waiting)]
        except OSError as error:
            if error.errno not in FULL or len(self._waiting) > _HELD_BYTES:
                raise

    def close(self) -> None:
        """Close the file; idempotent."""
        with self._lock:
            if self._open:
                self._open = False
                os.close(self._file)


class Tail:
    """The reading end: every call returns what was appended since the last one, in whole lines.

    `offset` stands behind the last whole line that was read. A line that is still torn is read again, since the next
    attempt cuts it off: a reader that had swallowed it would go on in the middle of what comes instead.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        """Follow `path`, which need not exist yet, from `offset`, where a line begins."""
        self.path = path
        self.offset = offset

    @classmethod
    def near_end(cls, path: Path, length: int) -> Tail:
        """Follow `path` from the first line that begins in its last `length` bytes."""
        tail = cls(path, max(0, size_of(path) - length))
        if tail.offset:
            with path.open("rb") as file:
                file.seek(tail.offset - 1)
                tail.offset += len(file.readline()) - 1
        return tail

    def lines(self, limit: int = 1 << 22) -> list[str]:
        """Return new whole lines, reading about `limit` bytes at most so that a long history never freezes a screen."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                block = file.read(limit)
                if len(block) == limit and b"\n" not in block:
                    block += file.readline()  # one line longer than a block
        except FileNotFoundError:
            return []
        *whole, torn = block.split(b"\n")
        self.offset += len(block) - len(torn)
        return [line.decode("utf-8", "replace") for line in whole]

    def records(self) -> list[Record]:
        """Return new records, skipping what this version does not know."""
        return [record for line in self.lines() if (record := decode(line)) is not None]


def size_of(path: Path) -> int:
    """Return the bytes of a file that need not exist."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def read_records(path: Path) -> list[Record]:
    """Return every record of a journal, oldest first; empty when there is none."""
    tail, found = Tail(path), []
    while lines := tail.lines():
        found += [record for line in lines if (record := decode(line)) is not None]
    return found


def last_record(path: Path) -> Record | None:
    """Return the newest record of a journal, read from its end: a million steps take half a minute to read from their start."""
    length = _BLOCK
    while True:
        tail, last = Tail.near_end(path, length), None
        while lines := tail.lines():
            last = next((record for line in reversed(lines) if (record := decode(line)) is not None), last)
        if last is not None or length >= size_of(path):
            return last
        length *= 8


def leave_wish(folder: Path, name: str, args: Mapping[str, Any] | None = None, *, attempt: int = 0) -> str:
    """Append a wish to the run in `folder` and return its id; the run answers with a `command` event."""
    wish_id = uuid.uuid4().hex
    line = json.dumps({"v": FORMAT_VERSION, "id": wish_id, "t": time.time(), "attempt": attempt, "name": name, "args": dict(args or {})})
    handle = os.open(folder / COMMANDS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(handle, line.encode() + b"\n")
    finally:
        os.close(handle)
    return wish_id


class Inbox:
    """Wishes left for this attempt; starts at the file's end, so an old `stop` is never obeyed again."""

    def __init__(self, folder: Path) -> None:
        """Skip what earlier attempts were asked."""
        self._tail = Tail(folder / COMMANDS)
        while self._tail.lines():
            pass

    def take(self) -> list[Wish]:
        """Return wishes that arrived since the last call."""
        return [wish for line in self._tail.lines() if (wish := _read_wish(line)) is not None]


def _read_wish(line: str) -> Wish | None:
    try:
        raw = json.loads(line)
        return Wish(str(raw["id"]), float(raw["t"]), int(raw.get("attempt", 0)), str(raw["name"]), dict(raw.get("args") or {}))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):  # whatever lies there, it must not end a run
        return None


class RunLock:
    """Proof that this process owns a run folder; the kernel drops it with the process, however that ends."""

    def __init__(self, folder: Path) -> None:
        """Take the lock.

        Raises:
            JournalError: another process holds it; its pid, host and start are named.
        """
        self._file: IO[str] = os.fdopen(os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "a+", encoding="utf-8")
        if not _taken(self._file):
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            self._file.close()
            raise JournalError(f"run {folder.name} is already running ({owner})", hint=f"qlora-tui attach {folder.name}")
        self._file.truncate(0)
        self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "start": round(time.time(), 3)}))
        self._file.flush()

    def release(self) -> None:
        """Give the folder back; idempotent."""
        self._file.close()


def _taken(file: IO[str]) -> bool:
    """Take the lock and say whether that was possible.

    `is_running`, in any process, holds a shared lock for an instant: only a refusal that lasts is another owner's.
    """
    for _ in range(_TRIES):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(_BETWEEN_SECONDS)
        else:
            return True
    return False


def is_running(folder: Path) -> bool:
    """Say whether a live process holds the run in `folder`, without taking the lock from it."""
    try:
        with (folder / LOCK).open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - _BLOCK)
            file.seek(start)
            at = file.read(end - start).rfind(b"\n")
            end = start + at + 1
            if at >= 0:
                break
        if end != size:
            file.truncate(end)
