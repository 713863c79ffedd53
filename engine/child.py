"""Work done in a process of its own: it can be stopped at once, and nothing it prints reaches the screen.

Downloads and conversions belong here: a thread that hangs in somebody's socket cannot be stopped, a process can.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from qlora_tui.engine.errors import Stopped
from qlora_tui.engine.text import one_line, redact

POLL_SECONDS = 0.2
GRACE_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Ended:
    """How a child ended: its exit code and all it said, on either stream."""

    code: int
    talk: str

    @property
    def last_words(self) -> str:
        """Return the line that most likely says why: the last that speaks of an error, else the last; safe to show."""
        lines = [line for line in self.talk.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()] or lines
        return one_line(redact(errors[-1]), limit=300) if errors else f"it ended with code {self.code} and said nothing"


def run(
    command: list[str],
    *,
    doing: str,
    stopping: Callable[[], bool] = lambda: False,
    watch: Callable[[], object] | None = None,
    env: Mapping[str, str] | None = None,
    seconds: float | None = None,
) -> Ended:
    """Run `command` to its end, calling `watch` and looking at `stopping` several times a second.

    The child has a session of its own: a Ctrl+C at the terminal reaches us alone, and we decide what becomes of it.
    It reads nothing, so it can never wait for an answer. After `seconds` it is ended, and a code below 0 is reported.

    Raises:
        Stopped: `stopping()` became true; the child was asked to clean up, then ended.
        OSError: the command could not be started.
    """
    polls = itertools.count() if seconds is None else range(max(1, int(seconds / POLL_SECONDS)))
    with tempfile.TemporaryFile() as talk:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=talk, stderr=talk, env={**os.environ, **(env or {})}, start_new_session=True
        )
        try:
            _follow(child, polls, doing, stopping, watch or (lambda: None))
        finally:
            _end(child)
        talk.seek(0)
        return Ended(child.returncode, talk.read().decode("utf-8", "replace"))


def _follow(
    child: subprocess.Popen[bytes], polls: Iterable[int], doing: str, stopping: Callable[[], bool], watch: Callable[[], object]
) -> None:
    """Return once the child has ended or the polls are used up."""
    for _ in polls:
        if stopping():  # asked first: a wish from before the start counts, however quick the child is
            raise Stopped(f"stopped while {doing}; nothing half-made was kept")
        if _ended(child, POLL_SECONDS):
            return
        watch()


def _ended(child: subprocess.Popen[bytes], seconds: float) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(seconds)
        return True
    return False


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ask first, since installers then take their temporary files away, and insist after a moment."""
    if child.poll() is not None:
        return
    child.send_signal(signal.SIGINT)
    if not _ended(child, GRACE_SECONDS):
        child.kill()
        child.wait()
