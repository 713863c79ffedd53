"""`qlora-tui import`: a config of another tool as a run.toml, and what became of every setting in it. Loads no torch."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qlora_tui.engine import foreign
from qlora_tui.engine.errors import ExitCode
from qlora_tui.engine.foreign import writing
from qlora_tui.engine.foreign.ledger import CHANGES, HARMLESS, UNKNOWN, Entry, Imported
from qlora_tui.engine.rules import problems
from qlora_tui.engine.spec import changed
from qlora_tui.engine.text import one_line
from qlora_tui.tui.printer import Streams


def import_(options: argparse.Namespace) -> int:
    """Print what became of every setting, and write the run unless `--dry-run` is said; exit 0 also where something is left to say."""
    path, out = Path(options.file).expanduser(), Path(options.out).expanduser()
    made = foreign.load(path, options.origin)
    if not options.dry_run:
        writing.write(writing.text_of(made, path.name), out, force=options.force)
    written = None if options.dry_run else out
    streams = Streams()
    if options.json:
        streams.data.document(_document(made, path, written))
    else:
        for line in _lines(made, path, written):
            streams.data.line(line)
    return int(ExitCode.DONE)


def _document(made: Imported, path: Path, written: Path | None) -> dict[str, Any]:
    return {
        "file": one_line(path),
        "tool": made.tool,
        "kind": made.kind,
        "why": one_line(made.why),
        "mapped": [_row(entry) for entry in made.mapped],
        "changed": [_row(entry) for entry in made.changed],
        "dropped": [_row(entry) for entry in made.dropped],
        "defaults": [_row(entry) for entry in made.defaults],
        "notes": [one_line(note) for note in made.notes],
        "config": changed(made.run),
        "missing": [one_line(problem) for problem in problems(made.run)],
        "out": None if written is None else str(written),
    }


def _row(entry: Entry) -> dict[str, Any]:
    found: dict[str, Any] = {"from": one_line(entry.source), "value": entry.shown} if entry.source else {}
    found |= {"key": entry.key, "to": entry.to} if entry.key else {}
    found |= {"why": one_line(entry.why)} if entry.why else {}
    return found | ({"effect": entry.effect} if entry.effect else {})


def _lines(made: Imported, path: Path, written: Path | None) -> Iterator[str]:
    yield f"{one_line(path)}: {made.kind} of {made.tool} ({one_line(made.why)})"
    yield from _list("mapped", made.mapped)
    yield from _list("changed", made.changed)
    yield from _list("dropped, and the result changes", [entry for entry in made.dropped if entry.effect == CHANGES])
    yield from _list("dropped, and nobody here knows what it does", [entry for entry in made.dropped if entry.effect == UNKNOWN])
    yield from _harmless([entry for entry in made.dropped if entry.effect == HARMLESS])
    yield from _list(f"not in the file, and {made.tool} takes for granted", made.defaults)
    if made.notes:
        yield "note"
        yield from (f"  {one_line(note)}" for note in made.notes)
    missing = problems(made.run)
    if missing:
        yield "still to say"
        yield from (f"  {one_line(problem)}" for problem in missing)
    if written is None:
        yield "nothing was written (--dry-run)"
    else:
        yield f"written: {one_line(written)}"
        yield f"next: qlora-tui --config {one_line(shlex.quote(str(written)))} --dry-run"


def _list(title: str, entries: Sequence[Entry]) -> Iterator[str]:
    if entries:
        yield f"{title}: {len(entries)}"
        yield from (f"  {one_line(writing.line_of(entry))}" for entry in entries)


def _harmless(entries: Sequence[Entry]) -> Iterator[str]:
    """Yield what is dropped without harm, those of one reason together."""
    if not entries:
        return
    yield f"dropped without harm: {len(entries)}"
    for why in dict.fromkeys(entry.why for entry in entries):
        names = ", ".join(one_line(entry.source, limit=80) for entry in entries if entry.why == why)
        yield f"  {names}: {one_line(why)}"
