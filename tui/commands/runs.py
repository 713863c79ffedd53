"""The commands about runs that are there: list, compare, delete. None of them loads torch."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_tui.engine import removal
from qlora_tui.engine.errors import ConfigError, ExitCode
from qlora_tui.engine.removal import Doomed
from qlora_tui.engine.runs import RunInfo, find_run, list_runs
from qlora_tui.engine.text import one_line
from qlora_tui.engine.units import gib
from qlora_tui.tui.printer import Streams, table
from qlora_tui.tui.reading import on_a_line

_PLOT_LINES = 16


def runs(options: argparse.Namespace) -> int:
    """Print the runs, newest first."""
    folder = Path(str(options.flags.get("runs_dir", "runs"))).expanduser()
    found = list_runs(folder, everywhere="runs_dir" not in options.flags)
    streams = Streams()
    if options.json:
        streams.data.document([_run_row(info) for info in found])
    elif not found:
        streams.talk.line("no run yet; qlora-tui demo makes a first one")
    else:
        rows = [
            (info.id, info.state, f"{info.step}/{info.total_steps}", _loss(info), _when(info.started), str(info.path)) for info in found
        ]
        streams.data.write(table(("run", "state", "step", "loss", "began", "folder"), rows))
    return int(ExitCode.DONE)


def compare(options: argparse.Namespace) -> int:
    """Print runs beside each other: results, what was set differently, and their curves."""
    from qlora_tui.tui import compare as room

    folders = list(dict.fromkeys(_find(options, name).resolve() for name in options.names))
    if not 2 <= len(folders) <= room.MOST:
        same = f"only one run is named, {one_line(folders[0].name)}" if len(folders) == 1 else f"{len(folders)} runs are too many"
        raise ConfigError(f"{same}: a comparison takes two to {room.MOST}", hint="qlora-tui runs lists them", where="RUN")
    streams = Streams()
    with on_a_line(streams.talk) as reading:
        found = [room.look(folder, reading.say) for folder in folders]
    if options.json:
        streams.data.document(room.document(found))
    else:
        streams.data.write(room.lines(found) + _curves(found, streams))
    return int(ExitCode.DONE)


def _curves(found: Sequence[Any], streams: Streams) -> str:
    """Return the plot: in colours where the terminal has them, else each curve in its letter."""
    if not any(run.state.last for run in found):
        return ""
    from rich.console import Console

    from qlora_tui.tui import compare as room
    from qlora_tui.tui import plot

    colours = streams.data.colours
    width = shutil.get_terminal_size().columns if streams.data.terminal else 80
    letters = "" if colours else room.LETTERS
    drawn = plot.overlay([run.state.history.buckets for run in found], min(width, 160), _PLOT_LINES, letters)
    console = Console(width=width + 1, color_system="auto" if colours else None, force_terminal=colours, highlight=False)
    with console.capture() as kept:
        for index, letter in enumerate(room.LETTERS[: len(found)]):
            console.print(f" {letter}", style=f"bold {plot.css(plot.APART[index])}", end="", markup=False)
        console.print("  loss by step, smoothed", markup=False)
        console.print(drawn, markup=False, no_wrap=True, crop=False)
    return "\n" + kept.get()


def delete(options: argparse.Namespace) -> int:
    """Delete runs: all are looked at first, so that nothing is deleted where one of them must not be."""
    if "last" in options.names:
        raise ConfigError("`last` may be another run than you think", hint="name it by its id", where="RUN")
    folders = dict.fromkeys(_find(options, name).absolute() for name in options.names)
    doomed = [removal.weigh(folder, only_checkpoints=options.only_checkpoints) for folder in folders]
    streams = Streams()
    with removal.held(doomed):
        if not options.yes and not _agreed(doomed, streams, "checkpoints of " if options.only_checkpoints else ""):
            streams.talk.line("nothing was deleted")
            return int(ExitCode.INTERRUPTED)
        for one in doomed:
            removal.remove(one)
            if not options.json:
                streams.data.line(f"deleted {one_line(one.target)}, {gib(one.bytes)}")
    if options.json:
        streams.data.document([{"id": one.folder.name, "path": str(one.target), "bytes": one.bytes} for one in doomed])
    return int(ExitCode.DONE)


def _agreed(doomed: Sequence[Doomed], streams: Streams, what: str) -> bool:
    """Show what would go and ask; only a yes is one.

    Raises:
        ConfigError: nobody can be asked here.
    """
    for one in doomed:
        streams.talk.line(f"{gib(one.bytes):>9}  {one_line(one.target)}")
    if not (sys.stdin and sys.stdin.isatty() and streams.talk.terminal):
        raise ConfigError("nothing was deleted: there is no terminal to ask on", hint="say --yes", where="runs delete")
    total = gib(sum(one.bytes for one in doomed))
    streams.talk.write(f"delete {what}{len(doomed)} run{'s' if len(doomed) > 1 else ''}, {total}, for good? [y/N] ")
    try:
        return sys.stdin.readline().strip().lower() in ("y", "yes")
    except KeyboardInterrupt:
        streams.talk.line()
        return False


def _find(options: argparse.Namespace, name: str) -> Path:
    return find_run(name, Path(str(options.flags.get("runs_dir", "runs"))).expanduser())


def _run_row(info: RunInfo) -> dict[str, Any]:
    return {
        "id": info.id,
        "state": info.state,
        "step": info.step,
        "total_steps": info.total_steps,
        "loss": info.loss,
        "started": info.started,
        "path": str(info.path),
    }


def _loss(info: RunInfo) -> str:
    return "" if info.loss is None or not math.isfinite(info.loss) else f"{info.loss:.4f}"


def _when(moment: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment)) if moment else ""
