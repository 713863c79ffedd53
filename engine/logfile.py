"""The run's `log.txt`: what we log, what libraries log, and warnings, made safe to show and free of secrets."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import TracebackType

from qlora_tui.engine.text import redact, safe_text


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
        """Leave the root logger as it was."""
        root = logging.getLogger()
        if self._handler is not None:
            root.removeHandler(self._handler)
            self._handler.close()
        root.setLevel(self._level)


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
