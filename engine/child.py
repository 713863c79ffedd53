"""Work done in a process of its own: it can be stopped at once, and nothing it prints reaches the screen.

Downloads and conversions belong here: a thread that hangs in somebody's socket cannot be stopped, a process can.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from qlora_tui.engine.errors import EngineError, Stopped
from qlora_tui.engine.text import one_line, redact

POLL_SECONDS = 0.2
GRACE_SECONDS = 0.6
"""With the poll before it, an end within a second; what it leaves is temporary files that the next one overwrites or removes."""
SAID_WHY = 3
"""The exit code of a child whose last line is one of our errors, as JSON."""


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


def say_why(error: EngineError) -> int:
    """Tell the parent, as the last words on stderr, why this child ends; return the exit code that says so."""
    problem = error.problem
    said = {"kind": type(error).__name__, "message": problem.message, "where": problem.where, "hint": problem.hint}
    sys.stderr.write("\n" + json.dumps(said) + "\n")
    return SAID_WHY


def raise_why(ended: Ended, *kinds: type[EngineError]) -> None:
    """Raise what a child said with `say_why`, if it did; `kinds` are the errors that it may name."""
    if ended.code == SAID_WHY:
        said = json.loads(ended.talk.splitlines()[-1])
        kind = next(kind for kind in kinds if kind.__name__ == said["kind"])
        raise kind(said["message"], where=said["where"], hint=said["hint"])


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
