"""Watch a run of another process, or one that is over: the same screen, or the same lines."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from qlora_tui.engine.errors import ExitCode
from qlora_tui.engine.events import Finished, Record
from qlora_tui.engine.journal import EVENTS, Tail, is_running
from qlora_tui.engine.runs import LOG, find_run
from qlora_tui.engine.text import one_line
from qlora_tui.tui.commands.lines import LOOKS_A_SECOND
from qlora_tui.tui.commands.run import can_draw
from qlora_tui.tui.printer import Printer, Streams


def attach(options: argparse.Namespace) -> int:
    """Show a run; closing the view never ends the run."""
    folder = find_run(options.name, Path(str(options.flags.get("runs_dir", "runs"))).expanduser())
    streams, name = Streams(), one_line(folder.name)
    if options.no_ui or options.json or not can_draw():
        return _lines(folder, streams, as_json=options.json)
    from qlora_tui.tui import opening, preferences

    opening.begin()
    from qlora_tui.tui.app import run_app

    shown = run_app(
        start=None,
        draft=None,
        follow=folder,
        readonly=options.readonly,
        mouse=not options.no_mouse,
        ascii_only=options.ascii,
        demo=False,
        preferences=preferences.read(options.theme),
    )
    if shown.kind == "crashed":
        streams.talk.line(f"the screen failed: {shown.detail}; the run is not touched by that")
        return int(ExitCode.FAILED)
    if is_running(folder):
        streams.talk.line(f"run {name} goes on; qlora-tui attach {name} shows it again")
    return int(ExitCode.DONE)


def _lines(folder: Path, streams: Streams, *, as_json: bool) -> int:
    """Print a run from its first event until it ends or nobody reads any more."""
    tail, printer = Tail(folder / EVENTS), Printer(streams, folder)
    last: Record | None = None
    while not streams.data.closed:
        running = is_running(folder)  # asked before reading, so that the last word is read before the loop ends
        records = tail.records()
        for record in records:
            last = record
            if as_json:
                streams.data.event(record)
            else:
                printer.show(record)
        if not records and not running:
            break
        if not records:
            time.sleep(1 / LOOKS_A_SECOND)
    if last is not None and not isinstance(last.event, Finished) and not streams.data.closed:
        streams.talk.line(f"run {one_line(folder.name)} crashed: it has no last word and no process; its log is {one_line(folder / LOG)}")
        streams.talk.line(f"go on from its last checkpoint: qlora-tui --resume {one_line(folder.name)}")
    return int(ExitCode.DONE)
