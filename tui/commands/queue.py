"""The queue from the command line: add, list, remove, and work through it, one run after another.

Each run is a process of its own, as with `--detach`: one that dies takes neither the queue nor the next run with it, and
the card's memory is free again. Its lines are printed from its journal, as everywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from qlora_tui.engine import notify, preset, queue, runs
from qlora_tui.engine.errors import ConfigError, EngineError, ExitCode
from qlora_tui.engine.events import Finished
from qlora_tui.engine.journal import EVENTS, is_running, last_record, leave_wish
from qlora_tui.engine.places import place, replace_file
from qlora_tui.engine.queue import Entry
from qlora_tui.engine.spec import BUILTIN
from qlora_tui.engine.text import one_line, redact
from qlora_tui.tui.commands import run as command
from qlora_tui.tui.commands.lines import LOOKS_A_SECOND, RunLines
from qlora_tui.tui.printer import Streams, table
from qlora_tui.tui.reading import Reading, on_a_line

_BEGIN_SECONDS = 30.0
_CODES = {signal.SIGINT: ExitCode.INTERRUPTED, signal.SIGTERM: ExitCode.TERMINATED}


def enqueue(plan: command.Plan, reading: Reading) -> Entry:
    """Check a run as if to start it on a free card, and queue it.

    Raises:
        EngineError: the run cannot be, in one sentence or a list of them.
    """
    from qlora_tui.engine import preflight

    placed = command.anchored(dataclasses.replace(plan.run, runs_dir=str(Path(plan.run.runs_dir).expanduser().absolute())))
    preflight.check(placed, alone=True, stopping=reading.stopping, progress=reading.progress)
    return queue.add(placed, plan.name or placed.model_name_or_path.removeprefix(BUILTIN), plan.folder)


def add(options: argparse.Namespace) -> int:
    """Check a run as if to start it, and queue it: what is wrong is told now and not in the night."""
    streams = Streams()
    with on_a_line(streams.talk) as reading:
        entry = enqueue(command.planned(options), reading)
    if options.json:
        streams.data.document(_row(entry))
        return int(ExitCode.DONE)
    before = sum(one.state != "ended" for one in queue.entries()) - 1
    streams.data.line(str(entry.id))
    start = "it begins when its turn comes" if queue.runner_pid() is not None else "start with: qlora-tui queue run"
    streams.talk.line(f"queued as {entry.id}, {before} before it; {start}")
    return int(ExitCode.DONE)


def show(options: argparse.Namespace) -> int:
    """Print the queue."""
    streams, found = Streams(), queue.entries()
    if options.json:
        streams.data.document([_row(entry) for entry in found])
    elif not found:
        streams.talk.line("the queue is empty; qlora-tui queue add takes the options of a run")
    else:
        rows = [(str(entry.id), _state(entry), entry.name, entry.folder or entry.run.runs_dir) for entry in found]
        streams.data.write(table(("id", "state", "run", "folder"), rows))
        pid = queue.runner_pid()
        streams.talk.line(f"process {pid} works through it" if pid else "nobody works through it: qlora-tui queue run")
    return int(ExitCode.DONE)


def remove(options: argparse.Namespace) -> int:
    """Take runs out of the queue; what they trained stays."""
    wanted = list(options.ids)
    if options.ended:
        wanted += [entry.id for entry in queue.entries() if entry.state == "ended"]
    if not wanted and not options.ended:
        raise ConfigError("no run named", hint="name its ID, or say --ended for all that have ended", where="queue remove")
    streams, gone = Streams(), queue.remove(wanted)
    if options.json:
        streams.data.document([_row(entry) for entry in gone])
    for entry in gone if not options.json else ():
        streams.data.line(f"removed {entry.id}, {one_line(entry.name)}")
    return int(ExitCode.DONE)


def stop(options: argparse.Namespace) -> int:
    """Stop the run that is under way, saved, and leave the rest queued: what Ctrl+C does where the queue runs."""
    streams, pid = Streams(), queue.runner_pid()
    if not pid:
        streams.talk.line("nobody works through the queue")
        return int(ExitCode.DONE)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGINT)
    streams.talk.line(f"process {pid} stops its run at the next safe point and saves it; the rest stays queued")
    return int(ExitCode.DONE)


def run(options: argparse.Namespace) -> int:
    """Work through the queue; a run that fails does not hold up the next, unless that was asked for."""
    streams = Streams()
    if options.detach:
        return _detach(options, streams)
    with queue.runner(), _Stopping(streams) as stopping:
        ended: list[Entry] = []
        while not stopping.code and (entry := queue.take()) is not None:
            ended.append(_one(entry, stopping, streams, quiet=options.json))
            if options.stop_on_error and ended[-1].exit_code and not stopping.code:
                streams.talk.line("the rest stays queued, since --stop-on-error was said")
                break
    codes = [code for one in ended if (code := one.exit_code) is not None]
    if options.json:
        streams.data.document([_row(entry) for entry in ended])
    else:
        _summary(ended, streams)
    return stopping.code or queue.worst(codes)


class _Stopping:
    """Ctrl+C and SIGTERM, passed on to the run under way; a lost terminal ends nothing."""

    def __init__(self, streams: Streams) -> None:
        self.code = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._presses, self._passed, self._talk = 0, 0, streams.talk
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stopping:
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        for number in _CODES:
            signal.signal(number, self._end)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def mind(self, folder: Path | None, process: subprocess.Popen[bytes] | None = None) -> None:
        """Stop this run from now on; a signal that came while there was none to stop counts for it."""
        self._folder, self._process = folder, process
        if folder is not None and self._passed < self._presses:
            self._pass_on(signal.SIGINT)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.code = int(_CODES[signal.Signals(number)])
        self._presses += 1
        self._pass_on(number)
        more = "; once more ends it at once without saving" if self._presses == 1 else ""
        self._talk.raw(f"\nstopping the run at its next safe point and saving it; it stays queued, and so does the rest{more}\n")

    def _pass_on(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)
        elif self._folder is not None:  # begun by a runner that was killed: it is no child of ours
            leave_wish(self._folder, "stop" if self._presses == 1 else "abort")
        else:
            return
        self._passed = self._presses


def _one(entry: Entry, stopping: _Stopping, streams: Streams, *, quiet: bool) -> Entry:
    """Run one entry to its end and write down what became of it."""
    if not quiet:
        streams.talk.line(f"queue: run {entry.id}, {one_line(entry.name)}")
    try:
        folder, entry = _prepared(entry)
        code, word = _attempt(folder, stopping, streams, quiet=quiet)
    except (EngineError, OSError) as error:
        streams.talk.line(redact(one_line(error, limit=2000)))
        failed = error.exit_code if isinstance(error, EngineError) else ExitCode.FAILED
        return queue.note(entry, state="ended", outcome="failed", exit_code=int(failed))
    if word is None and stopping.code:  # ended before it could say a word
        return queue.note(entry, state="waiting", outcome="stopped", exit_code=stopping.code)
    if word is None:
        told = f"its process ended with code {code} and no last word; the log is {one_line(folder / runs.LOG)}"
        word = Finished("failed", int(ExitCode.FAILED), told)
        streams.talk.line(told)
        notify.tell(entry.run, notify.Facts(folder), word)  # its owner is gone
    if stopping.code and word.outcome in ("stopped", "aborted"):
        return queue.note(entry, state="waiting", outcome=word.outcome, exit_code=word.exit_code)
    return queue.note(entry, state="ended", outcome=word.outcome, exit_code=word.exit_code)


def _prepared(entry: Entry) -> tuple[Path, Entry]:
    """Return the folder of a run that is about to begin, or to go on; its settings are in it."""
    folder = Path(entry.folder) if entry.folder else None
    if folder is None or not folder.is_dir():
        folder = runs.new_run_folder(entry.run, entry.name)
        entry = queue.note(entry, folder=str(folder.resolve()))
    if not is_running(folder):
        replace_file(runs.claim(folder) / runs.RUN_FILE, preset.to_toml(entry.run))
    return folder, entry


def _attempt(folder: Path, stopping: _Stopping, streams: Streams, *, quiet: bool) -> tuple[int, Finished | None]:
    """Start the run, or follow one that a killed runner left running or ended; return its process's code and its last word."""
    follower = RunLines(folder, streams, as_json=False)
    before = last_record(folder / EVENTS)
    due = not is_running(folder) and (before is None or not _over(before.event))
    process = command.spawn(folder) if due else None
    stopping.mind(folder, process)
    code: int | None = None
    while code is None:
        code = _ended(process, folder)
        if not quiet:
            follower.drain()
    stopping.mind(None)
    last, old = last_record(folder / EVENTS), before.seq if before is not None and due else 0
    return code, last.event if last is not None and last.seq > old and isinstance(last.event, Finished) else None


def _over(event: object) -> bool:
    """Say whether a last word means that there is nothing to go on with: a stop leaves something."""
    return isinstance(event, Finished) and event.outcome not in ("stopped", "aborted")


def _ended(process: subprocess.Popen[bytes] | None, folder: Path) -> int | None:
    """Wait a moment; return the code of a run that has ended meanwhile."""
    if process is None:
        time.sleep(1 / LOOKS_A_SECOND)
        return None if is_running(folder) else int(ExitCode.DONE)
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(1 / LOOKS_A_SECOND)
    return None


def _detach(options: argparse.Namespace, streams: Streams) -> int:
    """Work through the queue in a process of its own; return once it has begun."""
    log = place("state") / "queue.log"
    words = [sys.executable, "-P", "-m", "qlora_tui.tui", "queue", "run", *(["--stop-on-error"] if options.stop_on_error else [])]
    log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600), "wb") as said:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True)
    deadline = time.monotonic() + _BEGIN_SECONDS
    while queue.runner_pid() != process.pid and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if process.poll():
        streams.talk.line(f"it ended at once, with code {process.returncode}; its lines are in {one_line(log)}")
        return int(process.returncode) if process.returncode > 0 else int(ExitCode.FAILED)
    if options.json:
        streams.data.document({"pid": process.pid, "log": str(log)})
    else:
        streams.data.line(str(process.pid))
        streams.talk.line(f"process {process.pid} works through the queue; its lines are in {one_line(log)}")
        streams.talk.line("stop it with: qlora-tui queue stop")
    return int(ExitCode.DONE)


def _summary(ended: Sequence[Entry], streams: Streams) -> None:
    if not ended:
        streams.talk.line("nothing waits in the queue; qlora-tui queue add takes the options of a run")
        return
    streams.data.write("\n" + table(("id", "ended", "run", "folder"), [(str(one.id), _state(one), one.name, one.folder) for one in ended]))
    left = sum(one.state == "waiting" for one in queue.entries())
    if left:
        streams.talk.line(f"{left} still queued; qlora-tui queue run goes on with them")


def _state(entry: Entry) -> str:
    """Return how an entry stands, in words."""
    if entry.state == "ended":
        return entry.outcome.replace("_", " ")
    if entry.state == "running":
        return "running" if entry.folder and is_running(Path(entry.folder)) else "cut off, goes on"
    return f"{entry.outcome}, goes on" if entry.outcome else "waiting"


def _row(entry: Entry) -> dict[str, Any]:
    folder = Path(entry.folder) if entry.folder else None
    return {
        "id": entry.id,
        "state": entry.state,
        "name": entry.name,
        "run": folder.name if folder else None,
        "path": str(folder) if folder else None,
        "outcome": entry.outcome,
        "exit_code": entry.exit_code,
        "added": entry.added,
    }
