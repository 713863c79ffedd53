"""How far the reading is, and files as plain bytes: counted as they are read, unpacked where they are compressed.

A compressed file is never unpacked as a whole: what is read is held, so a small file that unpacks to a very large
one costs time and a progress bar, not memory.
"""

from __future__ import annotations

import gzip
import io
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeVar

from qlora_tui.engine.errors import DataError
from qlora_tui.engine.text import one_line

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Stopping = Callable[[], None]
Progress = Callable[[int, int], None]

Item = TypeVar("Item")

BLOCK_BYTES = 2**20
_LOOK_EVERY_SECONDS = 0.1
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_PACKED: Mapping[bytes, str] = {_GZIP: "gzip", _ZSTD: "zstd"}


def polled(items: Iterable[Item], stopping: Stopping, every: int = 16) -> Iterator[Item]:
    """Yield the items, letting the caller stop before the first and then each so many of them."""
    for place, item in enumerate(items):
        if place % every == 0:
            stopping()
        yield item


class Tape:
    """Counts bytes read over all files, tells them, and lets a person stop; both at most ten times a second."""

    def __init__(self, total: int = 0, stopping: Stopping = lambda: None, progress: Progress = lambda done, total: None) -> None:
        """Begin at zero of `total` bytes; 0 means that nobody knows how many there are, as on a hub."""
        self.total, self._stopping, self._progress = total, stopping, progress
        self._before, self._done, self._size, self._next = 0, 0, 0, 0.0

    def begin(self, size: int) -> None:
        """Begin the next file, of `size` bytes on the disk; the one before counts as read."""
        self._before, self._done, self._size = self._before + self._size, 0, size

    def at(self, done: int) -> None:
        """Say how many bytes of this file are read."""
        self._done = min(done, self._size)
        self.look()

    def count(self, more: int) -> None:
        """Say that `more` bytes of this file are read."""
        self.at(self._done + more)

    def look(self) -> None:
        """Tell how far it is and let the caller stop, if that was long enough ago; whatever `stopping` raises goes through."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _LOOK_EVERY_SECONDS
        self._stopping()
        self._tell()

    def end(self) -> None:
        """Say that everything is read."""
        self._stopping()
        self._progress(self.total, self.total)

    def _tell(self) -> None:
        self._progress(min(self._before + self._done, self.total), self.total)


class _Reads(Protocol):
    def read(self, size: int, /) -> bytes: ...


def open_bytes(path: Path, tape: Tape) -> IO[bytes]:
    """Open `path` for reading once, from its start to its end, unpacked if it begins like a gzip or zstd file.

    Raises:
        DataError: later, while reading: the compressed file is cut off or damaged.
        OSError: it cannot be read.
    """
    tape.begin(path.stat().st_size)
    raw = path.open("rb", buffering=0)
    start = raw.read(4)
    raw.seek(0)
    kind = next((name for mark, name in _PACKED.items() if start.startswith(mark)), "")
    counted = _Counted(raw, tape)
    if not kind:
        return io.BufferedReader(counted, BLOCK_BYTES)
    inner: Any = gzip.GzipFile(fileobj=io.BufferedReader(counted, BLOCK_BYTES)) if kind == "gzip" else _zstd(counted)
    return io.BufferedReader(_Unpacked(inner, counted, tape, one_line(path)), BLOCK_BYTES)


def _zstd(file: io.RawIOBase) -> _Reads:
    import pyarrow

    found: _Reads = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")
    return found


class _Counted(io.RawIOBase):
    """A file on the disk whose reads are counted."""

    def __init__(self, file: io.FileIO, tape: Tape) -> None:
        self._file, self._tape = file, tape

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        got = self._file.readinto(buffer) or 0
        self._tape.count(got)
        return got

    def close(self) -> None:
        self._file.close()
        super().close()


class _Unpacked(io.RawIOBase):
    """The unpacked bytes of a compressed file; what goes wrong in it is said in one sentence."""

    def __init__(self, inner: _Reads, file: _Counted, tape: Tape, shown: str) -> None:
        self._inner, self._file, self._tape, self._shown = inner, file, tape, shown

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        self._tape.look()  # a kilobyte may unpack to megabytes, so counting reads of the file is not enough
        try:
            got = self._inner.read(len(view))
        except (EOFError, OSError, zlib.error) as error:
            raise self._fault(error) from None
        view[: len(got)] = got
        return len(got)

    def close(self) -> None:
        self._file.close()
        super().close()

    def _fault(self, error: Exception) -> DataError:
        words = str(error)
        if isinstance(error, EOFError) or "Truncated" in words:
            return DataError("the compressed file ends before its end", hint="was it copied whole? copy it again", where=self._shown)
        return DataError(f"the compressed file is damaged ({one_line(words, limit=120)})", hint="copy it again", where=self._shown)
