"""`qlora-tui watch`: what the detectors say about a run that is over, ours or another tool's. Loads no torch."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_tui.engine import runs
from qlora_tui.engine.errors import ConfigError, ExitCode
from qlora_tui.engine.events import Finding, plain
from qlora_tui.engine.places import is_here
from qlora_tui.engine.spec import WATCH_STOP, WATCHED
from qlora_tui.engine.text import one_line
from qlora_tui.engine.units import count
from qlora_tui.engine.watch import Setting, Watch
from qlora_tui.engine.watch.logs import Log, read_log
from qlora_tui.engine.watch.replay import Replayed, replay
from qlora_tui.tui.printer import Streams

_MARKS: Mapping[str, str] = {"info": "note", "warn": "WARNING", "stop": "STOP"}


def watch(options: argparse.Namespace) -> int:
    """Print what the watch says about a log, up to where it would have stopped the run; exit 4 if it would have."""
    log = read_log(_placed(options.log))
    setting = Setting(0, options.warmup or log.warmup_steps, options.batch or log.rows_per_step)
    told = replay(log.moments, Watch(setting, _names(log, "watch_stop", WATCH_STOP), _names(log, "watch_rollback", ())))
    streams = Streams()
    if options.json:
        streams.data.document(_document(told))
    else:
        streams.data.write("".join(f"{line}\n" for line in _lines(log, told)))
    return int(ExitCode.DONE if told.stop_step is None else ExitCode.DIVERGED)


def _placed(text: str) -> Path:
    """Return the path of a log, or of the run called `text`."""
    path = Path(text).expanduser()
    if is_here(path):
        return path
    try:
        return runs.find_run(text, Path("runs"))
    except ConfigError:
        return path  # what is not there is told by the reader of logs, with what it could be


def _names(log: Log, key: str, default: Sequence[str]) -> list[str]:
    """Return the detectors that the run itself named under `key`; a log of another version may know others."""
    named = log.config.get(key, default)
    return [name for name in named if name in WATCHED] if isinstance(named, (list, tuple)) else list(default)


def _document(told: Replayed) -> Any:
    return plain({"steps": told.steps, "stop_step": told.stop_step, "findings": [_finding(found) for found in told.findings]})


def _finding(found: Finding) -> dict[str, Any]:
    return {
        "detector": found.detector,
        "severity": found.severity,
        "step": found.step,
        "message": found.message,
        "advice": found.advice,
        "numbers": found.numbers,
    }


def _lines(log: Log, told: Replayed) -> list[str]:
    lines = [f"{count(told.steps)} steps of {log.kind}"]
    for found in told.findings:
        lines.append(f"{_MARKS[found.severity]} at step {found.step}, {found.detector}: {one_line(found.message)}")
        lines += [f"    {one_line(text)}" for text in found.advice]
        lines.append(f"    rule: {one_line(found.numbers.get('rule', ''))}")
    ending = "nothing to stop it for" if told.stop_step is None else f"it would have been stopped at step {told.stop_step}"
    return [*lines, ending]
