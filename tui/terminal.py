"""The terminal belongs to the screen alone while the screen is up.

Textual redirects Python's streams only: a C library, a child process or a logging handler made earlier still
writes straight onto the screen. So the terminal is duplicated for Textual, and file descriptors 1 and 2 point at a
log until the screen is gone. `sys.__stderr__` and `sys.__stdout__` are what Textual's driver reads; that this is no
promise of theirs is why it all lives in this file, under pty tests.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import select
import sys
import termios
import time
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, TextIO

from qlora_tui.tui import window

_LEAVE = (
    b"\x1b[<u"  # kitty keyboard protocol off
    b"\x1b[?1000l\x1b[?1003l\x1b[?1015l\x1b[?1006l\x1b[?1016l"  # mouse off
    b"\x1b[?2004l\x1b[?1004l\x1b[?2048l"  # paste marks, focus events, resize reports off
    b"\x1b[?7h\x1b[0m\x1b[?1049l\x1b[?25h"  # wrap on, plain colours, normal screen, cursor on
)

_LOOK, _PAUSE = 0.25, 0.01  # seconds between looks at a terminal that takes no bytes, and at one with no room for a character
_PATIENCE = 1.0  # seconds for a terminal that takes no bytes: a slow line gets its farewell, a dead one is left


class _Out(io.TextIOBase):
    """A text stream on a descriptor of its own; a terminal that went away swallows output instead of raising."""

    encoding = "utf-8"

    def __init__(self, handle: int, *, guard: TerminalGuard | None = None) -> None:
        super().__init__()
        self._handle, self._guard = handle, guard

    def write(self, text: str) -> int:
        data = text.encode("utf-8", "replace")
        with contextlib.suppress(OSError):  # EIO: the terminal is gone; the run must not die of it
            while data:
                self._wait()
                data = data[_written(self._handle, data) :]
        return len(text)

    def _wait(self) -> None:
        """Wait for a terminal that takes no bytes, for as long as nobody asked this process to end."""
        while self._guard is not None and not _takes(self._handle, _LOOK):
            self._guard.give_up_if_asked()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._handle

    def isatty(self) -> bool:
        return self._guard is not None and os.isatty(self._handle)


class TerminalGuard:
    """Hold the terminal for the screen and send all other output of this process to a log.

    Usable as a context manager; everything is put back on the way out, unless the terminal hung up: then output
    goes on into the log, since there is nothing left to print on.
    """

    active: ClassVar[TerminalGuard | None] = None

    def __init__(self, log: Path) -> None:
        """Remember where output goes; nothing is touched before `__enter__`."""
        self._log = log
        self._kept: dict[str, Any] = {}
        self._saved: tuple[int, int] | None = None
        self._terminal = -1
        self._farewell = -1
        self._modes: list[Any] | None = None
        self._asked = math.inf
        self.hung_up = self._titled = False

    def __enter__(self) -> TerminalGuard:
        """Take the terminal."""
        for stream in (sys.stdout, sys.stderr):
            _flush(stream)
        handle = _open_log(self._log)
        self._modes = _modes()
        self._saved = (os.dup(1), os.dup(2))
        self._terminal = _opened(2 if os.isatty(2) else 1)
        self._farewell = os.dup(self._terminal)
        self._kept = {name: sys.__dict__[name] for name in ("stdout", "stderr", "__stdout__", "__stderr__")}
        screen = _Out(self._terminal, guard=self)
        vars(sys).update(__stdout__=screen, __stderr__=screen)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.close(handle)
        if window.has_title(os.environ):
            self._titled = True
            _tell(self._terminal, window.KEEP_TITLE.encode())
        TerminalGuard.active = self
        self.route()
        return self

    def route(self) -> None:
        """Point `sys.stdout` and `sys.stderr` at the log; called again once Textual has put its own in their place."""
        sys.stdout, sys.stderr = _as_text(_Out(1)), _as_text(_Out(2))

    def move_log(self, log: Path) -> None:
        """Send output to another file from now on, such as the log of a run that has just begun."""
        try:
            handle = _open_log(log)
        except OSError:
            return  # the old log goes on; a viewer may look at a folder it cannot write
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.close(handle)

    def hang_up(self) -> None:
        """Give up the terminal for good: what is still written to it, or read from it, goes to /dev/null.

        Without this a writer thread blocks or dies on EIO, and Textual's input thread spins on a dead descriptor.
        """
        self.hung_up = True
        _silence(self._terminal, self._farewell, 0)

    def hurry(self) -> None:
        """Note that this process was asked to end; called from a signal handler, so it only assigns."""
        self._asked = min(self._asked, time.monotonic())

    def give_up_if_asked(self) -> None:
        """Treat a terminal that takes nothing as a lost one, once this process was asked to end and a moment has passed.

        Textual's loop waits for its writer, which waits for the terminal: without this a run that was saved on SIGTERM
        would keep its process, and the GPU, until somebody looks at the terminal again. What the terminal did not take
        is thrown away, so that the farewell has room and is there when it wakes up.
        """
        if self.hung_up or time.monotonic() - self._asked < _PATIENCE:
            return
        with contextlib.suppress(termios.error, OSError):
            termios.tcflush(self._terminal, termios.TCOFLUSH)
        self.leave()
        self.hang_up()

    @property
    def gone(self) -> bool:
        """Say whether the terminal went away: a terminal that is not the controlling one ends without a signal."""
        if self.hung_up:
            return True
        ends = select.POLLHUP | select.POLLERR | select.POLLNVAL
        watch = select.poll()
        watch.register(self._terminal, 0)  # nothing is waited for: only the ends are reported
        return any(event & ends for _, event in watch.poll(0))

    def leave(self) -> None:
        """Put the terminal into the state a shell expects, for good, whatever Textual is doing.

        The screen loses its descriptor first: a frame that its writer thread still holds would come after the
        farewell and paint over the shell. A write already under way ends before ours, since the kernel takes one
        write to a terminal at a time.
        """
        _silence(self._terminal)
        title, self._titled = window.TITLE_BACK.encode() if self._titled else b"", False  # taken back once: it is a stack
        _leave(self._farewell, self._modes, title)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Give everything back."""
        TerminalGuard.active = None
        for stream in (sys.stdout, sys.stderr):
            _flush(stream)
        vars(sys).update({name: self._kept[name] for name in ("__stdout__", "__stderr__")})
        if self._saved is None:
            return
        if self.hung_up:
            self.route()
        else:
            os.dup2(self._saved[0], 1)
            os.dup2(self._saved[1], 2)
            sys.stdout, sys.stderr = self._kept["stdout"], self._kept["stderr"]
            self.leave()
        for handle in (*self._saved, self._terminal, self._farewell):
            with contextlib.suppress(OSError):
                os.close(handle)
        self._saved = None


def restore_terminal() -> None:
    """Leave the alternate screen, mouse off, cursor and echo on; safe in a signal handler and without a screen.

    Writes nothing where no screen is up, and gives up after a moment if the terminal takes no bytes.
    """
    if TerminalGuard.active is not None:
        TerminalGuard.active.leave()


def _opened(handle: int) -> int:
    """Return a descriptor of its own for the terminal at `handle`, whose writes never wait.

    A duplicate would share that with the shell, which must not get a terminal in that mode; one that cannot be opened
    again waits as ever.
    """
    try:
        return os.open(os.ttyname(handle), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return os.dup(handle)


def _takes(handle: int, seconds: float) -> bool:
    """Say whether `handle` takes bytes, or is past taking any, within so many seconds."""
    watch = select.poll()  # unlike select, it takes any descriptor, however many are open
    watch.register(handle, select.POLLOUT)
    return bool(watch.poll(seconds * 1000))


def _written(handle: int, data: bytes) -> int:
    """Return how many bytes were taken, which may be none."""
    try:
        return os.write(handle, data)
    except BlockingIOError:
        time.sleep(_PAUSE)  # there was room for less than one character
        return 0


def _silence(*handles: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for handle in handles:
        with contextlib.suppress(OSError):
            os.dup2(null, handle)
    os.close(null)


def _leave(handle: int, modes: list[Any] | None, title: bytes) -> None:
    _tell(handle, title + _LEAVE)
    if modes is not None:
        with contextlib.suppress(termios.error, OSError):
            termios.tcsetattr(0, termios.TCSANOW, modes)


def _tell(handle: int, sequence: bytes) -> None:
    with contextlib.suppress(OSError, ValueError):
        if os.isatty(handle) and _takes(handle, _PATIENCE):
            _written(handle, sequence)


def _modes() -> list[Any] | None:
    try:
        return termios.tcgetattr(0)
    except (termios.error, OSError):
        return None


def _open_log(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _flush(stream: TextIO | None) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if stream is not None:
            stream.flush()


def _as_text(stream: _Out) -> Any:
    return stream
