"""The run's `log.txt`: what we log, what libraries log, and warnings, made safe to show and free of secrets."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from types import TracebackType

from qlora_tui.engine.text import redact, safe_text

_MOST_BYTES = 256 * 2**20  # of a log that is looked through; no run of ours comes near


class LogFile:
    """Send this process's log records to one private file for as long as the run lasts."""

    def __init__(self, path: Path) -> None:
        """Choose the file; it is opened on entry."""
        self._path = path
        self._handler: logging.Handler | None = None
        self._level = logging.WARNING

    def __enter__(self) -> LogFile:
        """Open the file (0600, appended, never through a link) and become a handler of the root logger."""
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        self._handler = _Closing(os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace"))
        self._handler.setFormatter(_Safe("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        self._level = root.level
        root.setLevel(logging.INFO)
        root.addHandler(self._handler)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave the root logger as it was, and the file without what libraries printed of secrets past it."""
        root = logging.getLogger()
        if self._handler is not None:
            root.removeHandler(self._handler)
            self._handler.close()
        root.setLevel(self._level)
        with contextlib.suppress(OSError):
            _scrub(self._path)


def _scrub(path: Path) -> None:
    """Take secrets out of a log that C code and child processes wrote to as well; in place, since they hold it open."""
    with path.open("r+b") as file:
        text = file.read(_MOST_BYTES).decode("utf-8", "surrogateescape")
        clean = redact(text)
        if clean != text:
            rest = file.read()
            file.seek(0)
            file.write(clean.encode("utf-8", "surrogateescape") + rest)
            file.truncate()


class _Closing(logging.StreamHandler):  # type: ignore[type-arg]
    """A stream handler that closes the file it was given, and never prints its own errors to the screen."""

    def close(self) -> None:
        self.stream.close()
        super().close()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  the name is logging's
        """A full disk must not write tracebacks over the screen."""


class _Safe(logging.Formatter):
    """Foreign text inside a message cannot steer the terminal that shows the log later, and no token is kept."""

    def format(self, record: logging.LogRecord) -> str:
        return safe_text(redact(super().format(record)), limit=200_000)
