"""A process that has the libraries imported and forks a child for every run it is asked for: `fork_server.py`, jobs on stdin.

A job is one JSON line: the settings, the folder, whether to resume, and the number of the operation on the disk at which
the child is to die by SIGKILL. The answer is one line: how the child ended, and how many operations it began.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Killer:
    """Counts what a process does to the disk and kills it at one of these instants: before it, or half way through a write."""

    def __init__(self, at: int, tally: int) -> None:
        self.at, self.tally, self.count = at, tally, 0

    def point(self, half: Callable[[], object] | None = None) -> None:
        """Count one instant, and one more inside where a write can be cut in half."""
        for cut in (None, half) if half else (None,):
            self.count += 1
            os.pwrite(self.tally, struct.pack("q", self.count), 0)
            if self.count == self.at:
                if cut:
                    cut()
                os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Stand before everything that changes a file or a folder."""
        from qlora_tui.engine import places

        for name in ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "remove", "chmod", "ftruncate"):
            self._before(os, name)
        self._before(places, "exchanged")
        write, opened = os.write, io.open

        def cut_write(handle: int, data: Any) -> int:
            self.point(lambda: write(handle, bytes(data)[: len(data) // 2]))
            return write(handle, data)

        def cut_open(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
            made = opened(file, mode, *rest, **named)
            return _Cut(made, self) if set(mode) & set("wax+") and not str(file).startswith("/proc") else made

        os.write, io.open, builtins.open = cut_write, cut_open, cut_open  # type: ignore[assignment]

    def _before(self, room: Any, name: str) -> None:
        real = getattr(room, name)

        def counted(*values: Any, **named: Any) -> Any:
            self.point()
            return real(*values, **named)

        setattr(room, name, counted)


class _Cut:
    """A file whose writes can be cut in half."""

    def __init__(self, file: Any, killer: Killer) -> None:
        self._file, self._killer = file, killer

    def write(self, data: Any) -> int:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._killer.point(half)
        return int(self._file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Cut:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Any:
        return iter(self._file)


def child(job: dict[str, Any], tally: int) -> int:
    """Run one attempt and return its exit code, if it lives to see it."""
    from qlora_tui.engine import places, preflight
    from qlora_tui.engine.journal import EVENTS
    from qlora_tui.engine.session import Session
    from qlora_tui.engine.spec import from_values
    from qlora_tui.engine.train import keeper

    keeper.CLEAN_STEPS = 2
    if not job["exchange"]:
        places.exchanged = lambda *_: False
    folder = Path(job["folder"])
    run = from_values({name: tuple(value) if isinstance(value, list) else value for name, value in job["run"].items()})
    checked = preflight.check(run)
    Killer(job["at"], tally).install()
    session = Session(run, checked, folder=folder, resume=(folder / EVENTS).exists())
    session.start()
    while not session.wait(60):
        pass
    return session.exit_code


def main() -> None:
    """Import once, then fork for every job."""
    import torch

    import qlora_tui.engine.preflight
    import qlora_tui.engine.train  # noqa: F401  imported for its cost

    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        tally = os.memfd_create("tally")
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                code = child(job, tally)
            finally:
                os._exit(code)
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        done = struct.unpack("q", os.pread(tally, 8, 0) or bytes(8))[0]
        os.close(tally)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), "operations": done}), flush=True)


if __name__ == "__main__":
    main()
