"""Screens in a child process under a real pseudo-terminal: what tests send, and every byte that comes back."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

PATIENCE = 40.0
_LOOKS = ("NO_COLOR", "CI", "COLUMNS", "LINES", "COLORTERM", "COLORFGBG", "SSH_CONNECTION", "TMUX", "STY")
"""What would make the screens look different where the tests run."""


class Terminal:
    """A terminal of a given size with a Python script on it."""

    def __init__(self, script: str, *arguments: str, size: tuple[int, int] = (80, 24), controls: bool = True, **environment: str) -> None:
        """Start `script` with the terminal as its controlling one, or as one whose end brings no signal."""
        self.master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        clean = {name: value for name, value in os.environ.items() if name not in _LOOKS}
        known = {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8", "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", (_TAKE if controls else _ALONE) + script, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=clean | known | environment,
        )
        self.seen = b""
        self._size, self._fed, self._picture = size, 0, None

    @property
    def shown(self) -> str:
        """Return what is on the screen now; only what came since the last time is read."""
        import pyte

        if self._picture is None:
            screen = pyte.Screen(*self._size)
            self._picture = (screen, pyte.ByteStream(screen))
        end = len(self.seen)
        last = self.seen.rfind(b"\x1b", max(self._fed, end - 64))
        end = last if last >= 0 else end  # a sequence may be here in part only
        self._picture[1].feed(_without_unknown(self.seen[self._fed : end]))
        self._fed = end
        screen = self._picture[0]  # its own `display` trips over a cell that a joined mark left empty
        return "\n".join("".join(screen.buffer[line][column].data for column in range(screen.columns)) for line in range(screen.lines))

    def until_shown(self, words: str, *, gone: bool = False) -> None:
        """Read until `words` stand on the screen, or no longer do."""
        deadline = time.monotonic() + PATIENCE
        while (words in self.shown) == gone:
            assert time.monotonic() < deadline, f"{words!r} never {'went' if gone else 'came'}:\n{self.shown}"
            self._read()

    def read_until(self, wanted: bytes, *, anew: bool = True) -> None:
        """Read until `wanted` was seen, unless `anew` is false and it was seen before; fail with the last bytes if it never comes.

        What is on the screen already is not sent again: only a screen that changes may be waited for anew.
        """
        deadline = time.monotonic() + PATIENCE
        start = len(self.seen) if anew else 0
        while wanted not in self.seen[max(0, start - len(wanted)) :]:
            assert time.monotonic() < deadline, f"{wanted!r} never came: {self.seen[-3000:]!r}"
            self._read()

    def read_some(self, seconds: float = 0.3) -> None:
        """Take what comes within `seconds`, so that the program is never blocked by a full terminal."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._read()

    def type(self, keys: bytes) -> None:
        """Send keys."""
        os.write(self.master, keys)

    def hang_up(self, *, signalled: bool = True) -> None:
        """Take the terminal away, as a lost connection does."""
        os.close(self.slave)
        os.close(self.master)
        self.master = self.slave = -1
        if signalled:
            self.process.send_signal(signal.SIGHUP)

    def wait(self) -> int:
        """Read on until the process ends, and return its code."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"it did not end: {self.seen[-3000:]!r}"
            if self.master >= 0:
                self._read()
            else:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(0.1)
        if self.master >= 0:
            while self._read():
                pass
        return self.process.returncode

    @property
    def modes(self) -> list[object]:
        """Return the terminal's modes as they are now."""
        return termios.tcgetattr(self.slave)

    def close(self) -> None:
        """End everything."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for handle in (self.master, self.slave):
            if handle >= 0:
                os.close(handle)

    def _read(self) -> bool:
        if not select.select([self.master], [], [], 0.1)[0]:
            return False
        self.seen += os.read(self.master, 65536)
        return True


_ALONE = "import os\nos.setsid()\n"
_TAKE = "import os, fcntl, termios\nos.setsid()\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"


def text_of(seen: bytes, size: tuple[int, int] = (80, 24)) -> str:
    """Return what a terminal would show after these bytes."""
    import pyte

    screen = pyte.Screen(*size)
    stream = pyte.ByteStream(screen)
    stream.feed(_without_unknown(seen))
    return "\n".join(screen.display)


def _without_unknown(seen: bytes) -> bytes:
    """Drop sequences that pyte prints instead of ignoring: private keyboard and mode queries."""
    return re.sub(rb"\x1b\[[<>=][0-9;]*u|\x1b\[\?[0-9;]*\$p", b"", seen)


def result(path: Path) -> str:
    """Return what the child wrote at its end."""
    return path.read_text() if path.exists() else ""


def not_given_back(seen: bytes) -> dict[str, str]:
    """Return what a terminal that took these bytes would still be in: modes, keyboard, title, and cells drawn after the farewell."""
    final: dict[str, str] = {}
    for numbers, state in re.findall(rb"\x1b\[\?([0-9;]+)([hl])", seen):
        final |= dict.fromkeys(numbers.decode().split(";"), state.decode())
    wanted = {mode: "h" if mode in ("7", "25") else "l" for mode in final}
    wrong = {f"mode {mode}": state for mode, state in final.items() if state != wanted[mode]}
    pushed, popped = len(re.findall(rb"\x1b\[>[0-9]+u", seen)), len(re.findall(rb"\x1b\[<[0-9]*u", seen))
    titles = len(re.findall(rb"\x1b\[22(?:;[0-9])?t", seen)) - len(re.findall(rb"\x1b\[23(?:;[0-9])?t", seen))
    after = seen.rsplit(b"\x1b[?1049l", 1)[-1]
    wrong |= {"keyboard": f"{pushed} > {popped}"} if pushed > popped else {}
    wrong |= {"title": "not given back"} if titles > 0 else {}
    wrong |= {"cells": repr(after)} if re.search(rb"\x1b\[[0-9]+;[0-9]+H", after) else {}
    return wrong


def assert_given_back(terminal: Terminal) -> None:
    assert not_given_back(terminal.seen) == {}
    assert terminal.modes == terminal.before
    assert b"LEAK" not in terminal.seen[terminal.seen.index(b"\x1b[?1049h") :], "text from C code reached the terminal"
