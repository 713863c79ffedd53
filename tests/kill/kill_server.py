"""The asking end of the fork server: attempts at runs, killed where a test says."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE = 120


@dataclass
class Server:
    """Asks the fork server for attempts at runs."""

    process: subprocess.Popen[str]

    def attempt(
        self, run: dict[str, Any], folder: Path, *, at: int = 0, after: float | None = None, exchange: bool = True
    ) -> tuple[int, int]:
        """Run one attempt and return its exit code (negative: the signal that ended it) and how many operations it began.

        It dies at operation `at`, or `after` so many seconds.
        """
        assert self.process.stdin is not None
        folder.mkdir(mode=0o700, exist_ok=True)
        self.process.stdin.write(json.dumps({"run": run, "folder": str(folder), "at": at, "exchange": exchange}) + "\n")
        self.process.stdin.flush()
        pid = self._line()["pid"]
        if after is not None and not select.select([self.process.stdout], [], [], after)[0]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        told = self._line()
        return told["code"], told["operations"]

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], PATIENCE)[0], "the fork server does not answer"
        told: dict[str, Any] = json.loads(self.process.stdout.readline())
        return told
